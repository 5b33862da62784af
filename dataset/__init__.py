"""Latents and images as training reads them: formats, order, conversion."""
