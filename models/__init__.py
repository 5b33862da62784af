"""Networks, loss, samplers and autoencoders. Imports torch; diffusers only when an autoencoder is loaded.

A network of one's own is a file and a line in MODELS: its class, under the part of model.model_type before "-" or "/".
The class gets model_type and every other key of the config's model section as keyword arguments, those of
model.options among them, and activation_checkpointing (take `**unused` for those that mean nothing to it). It needs
- the attributes in_size, in_channels, patch_size, num_tokens and num_classes (0: unconditional), and
- forward(x, c_noise, class_labels, mask) -> like x. x: (B, C, H, W), unit variance. c_noise: (B,) or (1,), ln(sigma) / 4.
  class_labels: (B,) int64, num_classes meaning unconditional, or None for all. mask: TokenMask, or None.
EDMPrecond makes a denoiser of it. Blocks of the class DiTBlock are compiled and cast; others run as they are.

A loss of one's own is a class and a line in LOSSES. It is made and called as EDMLoss is, and returns {name: (B,) losses}.
A sampler of one's own is a function and a line in SAMPLERS; see models/samplers.py.
"""

import inspect
import re

from utils.cli import UserError
from .autoencoder import load_autoencoder, sample_moments
from .edm import LOSSES, SIGMA_DATA, EDMLoss, EDMPrecond, LossDraws, drop_labels
from .maskdit import MaskDiT
from .masking import TokenMask, random_mask
from .samplers import SAMPLERS, ablation_sampler, edm_sampler, guided

__all__ = ["LOSSES", "MODELS", "SAMPLERS", "SIGMA_DATA", "EDMLoss", "EDMPrecond", "LossDraws", "MaskDiT", "TokenMask",
           "ablation_sampler", "build_model", "drop_labels", "edm_sampler", "guided", "load_autoencoder", "random_mask",
           "sample_moments"]

MODELS = {"DiT": MaskDiT}


def build_model(model_type="DiT-XL/2", **config):
    """The denoiser (EDMPrecond) of a network in MODELS, with fresh weights.

    config: the class's other arguments. Raises UserError for a name that MODELS lacks and an argument that the class lacks.
    """
    name = re.split("[-/]", str(model_type))[0]
    if name not in MODELS:
        raise UserError(f"model.model_type={model_type!r} is unknown: it begins with the name of a network, "
                        f"one of {', '.join(MODELS)}, as in DiT-XL/2")
    arguments = inspect.signature(MODELS[name]).parameters
    takes_all = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    for key in config:
        if key not in arguments and not takes_all:
            raise UserError(f"model.options.{key}: {MODELS[name].__name__} does not take {key}; it takes {', '.join(arguments)}")
    return EDMPrecond(MODELS[name](model_type=model_type, **config))
