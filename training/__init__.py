"""The training loop and what it keeps: optimizer steps, average, checkpoints, pictures and numbers on the way."""
