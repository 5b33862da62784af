"""MaskDiT: networks, loss, samplers and autoencoders. Imports torch; diffusers only when an autoencoder is loaded."""

from .autoencoder import load_autoencoder, sample_moments
from .loss import EDMLoss, LossDraws, LossParts, drop_labels
from .masking import TokenMask, random_mask
from .precond import EDMPrecond, create_model
from .samplers import SharedConditioning, ablation_sampler, edm_sampler, guided

__all__ = ["EDMLoss", "EDMPrecond", "LossDraws", "LossParts", "SharedConditioning", "TokenMask", "ablation_sampler",
           "create_model", "drop_labels", "edm_sampler", "guided", "load_autoencoder", "random_mask", "sample_moments"]
