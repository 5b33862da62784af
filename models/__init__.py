"""MaskDiT: networks, loss, samplers and autoencoders. Imports torch; diffusers only when an autoencoder is asked for."""

from .loss import EDMLoss, LossDraws, LossParts, drop_labels
from .masking import TokenMask, random_mask
from .precond import EDMPrecond, create_model
from .sampler import ablation_sampler, edm_sampler, guided

_AUTOENCODER_NAMES = ("load_autoencoder", "sample_moments")

__all__ = ["EDMLoss", "EDMPrecond", "LossDraws", "LossParts", "TokenMask", "ablation_sampler", "create_model",
           "drop_labels", "edm_sampler", "guided", "random_mask", *_AUTOENCODER_NAMES]


def __getattr__(name):
    if name in _AUTOENCODER_NAMES:
        from . import autoencoder
        return getattr(autoencoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
