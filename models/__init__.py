"""Networks, losses, samplers and autoencoders. Imports torch; diffusers only when an autoencoder is loaded.

A network of your own is a file and a line in MODELS, {first part of model.model_type, before "-" or "/": class}.
The class gets as keyword arguments model_type and the other keys of the config's model section, those of model.options
among them, and activation_checkpointing. Take `**unused` for those that mean nothing to it. It needs
- the attributes in_size, in_channels, patch_size, num_tokens and num_classes (0: unconditional), and
- forward(x, c_noise, class_labels, mask) -> like x. x: (B, C, H, W), unit variance. c_noise: (B,) or (1,), ln(sigma) / 4.
  class_labels: (B,) int64, where num_classes means unconditional; None: unconditional. mask: TokenMask or None.
EDMPrecond makes a denoiser of it. It compiles and casts only blocks of the class DiTBlock; others run as they are.

A loss of your own is a class and a line in LOSSES. It is made and called as EDMLoss is, returns {name: (B,) losses} and has
weights, {name: weight in the sum}. A sampler of your own is a function and a line in SAMPLERS: see models/samplers.py.
"""

import inspect
import re

from utils.cli import UserError
from .autoencoder import load_autoencoder, sample_moments
from .edm import LOSSES, SIGMA_DATA, EDMLoss, EDMPrecond, LossDraws, drop_labels
from .maskdit import MaskDiT
from .masking import TokenMask, random_mask
from .samplers import SAMPLERS, ablation_sampler, edm_sampler, guided

MODELS = {"DiT": MaskDiT}


def build_model(model_type="DiT-XL/2", **config):
    """The denoiser (EDMPrecond) of a network in MODELS, with fresh weights.

    config: the other arguments of its class. Raises UserError for an unknown name, and for unknown or missing arguments.
    """
    name = re.split("[-/]", str(model_type))[0]
    if name not in MODELS:
        raise UserError(f"model.model_type={model_type!r} is unknown: it begins with the name of a network, "
                        f"one of {', '.join(MODELS)}, as in DiT-XL/2")
    signature = inspect.signature(MODELS[name])
    try:
        signature.bind(model_type=model_type, **config)
    except TypeError as error:  # it names the argument that is unknown or missing
        raise UserError(f"model.options does not fit {MODELS[name].__name__}: {error}; "
                        f"it takes {', '.join(signature.parameters)}") from error
    return EDMPrecond(MODELS[name](model_type=model_type, **config))
