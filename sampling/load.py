"""From a checkpoint file to weights, and to a network that is ready to sample.

A checkpoint is checked before use, and nothing in it is executed. Ours have a manifest beside them (NNNNNNN.json: size and
sha256), which training/checkpoint.py writes.
"""

import argparse
import functools
import json
import math
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from models import build_model
from models.layers import sincos_positions
from utils import distributed
from utils.class_names import load_imagenet_class_names
from utils.cli import UserError
from utils.config import from_dict, load_config, model_arguments
from utils.files import file_sha256
from utils.logging import say
from utils.precision import DTYPES, effective_amp, use_compile

PARTS = {"model": dict, "ema": dict, "opt": dict, "step": int, "images_seen": int, "config": dict, "latents": dict}  # of a checkpoint
say_once = functools.cache(say)  # the grids and the evaluations of a run each load a decoder


def load_checkpoint(path):
    """`read_checkpoint`, if the file is whole: rank 0 reads all of it, and the others wait for the verdict. Collective."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    if problem := distributed.broadcast_object(damage(path) if distributed.is_main() else None):
        raise UserError(f"checkpoint {path} is damaged: {problem}; take another one, or download it again")
    return read_checkpoint(path)


def read_checkpoint(path):
    """A checkpoint as a dict, ours or a published one. Its tensors are mapped from the file: to keep them, copy them.

    Only tensors, plain containers and argparse.Namespace (the published `args`) are let in. Raises UserError for all else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|global:?) ([\w]+\.[\w.]+)", str(error))
        what = f"it contains {named[1]}" if named else "its pickle is not readable"
        raise UserError(f"checkpoint {path} is refused: {what}; only tensors, plain containers and argparse.Namespace are accepted, "
                        f"and nothing was executed") from error
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler, with any class
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}: {first_line(error)}); "
                        f"it is damaged or not a PyTorch file") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: wanted a dict with 'model' or 'ema', found {type(content).__name__}")
    for name, kind in PARTS.items():
        if name in content and not isinstance(content[name], kind):
            raise UserError(f"checkpoint {path}: its {name!r} is a {type(content[name]).__name__}, wanted a {kind.__name__}")
    return content


def weights_of(checkpoint, which, path):
    """The "ema" or "model" weights of a loaded checkpoint under the published names (`model.pos_embed`, ...), as a state dict.

    A checkpoint may be a state dict itself. path: for messages. Raises UserError if there are no such weights.
    """
    if "ema" in checkpoint or "model" in checkpoint:
        if which not in checkpoint:
            raise UserError(f"checkpoint {path} has no {which!r} weights; it has {', '.join(map(str, checkpoint))}")
        checkpoint = checkpoint[which]
    if not checkpoint or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in checkpoint.items()):
        raise UserError(f"checkpoint {path} holds no state dict: wanted names with tensors")
    return {strip_prefixes(name): value for name, value in checkpoint.items()}


def strip_prefixes(name):
    """'module._orig_mod.model.pos_embed' -> 'model.pos_embed': without what DDP and torch.compile put before names."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def steps_done(checkpoint):
    """Optimizer steps behind a checkpoint: ours say so; the published ones hold it in AdamW's state. 0 if neither does."""
    states = checkpoint.get("opt", {}).get("state", {})
    return int(checkpoint.get("step") or max((state.get("step", 0) for state in states.values()), default=0))


def load_weights_into(net, weights, path, skip_mismatched=False, remedy="check the model section of the config", tell=say):
    """Load a state dict into `net`. Raises UserError with the names of what is missing, unknown or of another shape.

    skip_mismatched: leave those out and `tell` so; position tables of another grid are interpolated. remedy: what the error advises.
    """
    own = net.state_dict()
    if skip_mismatched:
        weights = {name: _fit_positions(name, value, own, path, tell) for name, value in weights.items()}
    fits = {name: name in own and value.shape == own[name].shape for name, value in weights.items()}
    misfits = {"missing": own.keys() - weights.keys(), "unknown": weights.keys() - own.keys(),
               "other shape": {f"{name} {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
                               for name in weights.keys() & own.keys() if not fits[name]}}
    problems = "; ".join(f"{kind}: {some_of(sorted(names))}" for kind, names in misfits.items() if names)
    if problems and not skip_mismatched:
        raise UserError(f"checkpoint {path} does not fit the model; {problems}; {remedy}")
    if not any(fits.values()):
        raise UserError(f"checkpoint {path} has nothing that fits the model; {problems}")
    if problems:
        tell(f"checkpoint {path}: left at fresh values or out; {problems}")
    net.load_state_dict({name: value for name, value in weights.items() if fits[name]}, strict=False)


def _fit_positions(name, value, own, path, tell):
    """A position table of another grid, computed for the grid of the network; anything else as it is."""
    if not name.endswith("pos_embed") or name not in own or value.dim() != 3 or value.shape[2] != own[name].shape[2]:
        return value
    (old, width), new = value.shape[1:], own[name].shape[1]
    old_grid, new_grid = math.isqrt(old), math.isqrt(new)
    if old == new or old_grid**2 != old or not torch.allclose(value, sincos_positions(width, old_grid), atol=1e-3):
        return value
    tell(f"checkpoint {path}: {name} is interpolated from {old_grid} x {old_grid} to {new_grid} x {new_grid} patches")
    return sincos_positions(width, new_grid, unit_grid=old_grid)


def some_of(names, count=6):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def damage(path):
    """What is wrong with a checkpoint file, or None. The manifest's checksum is compared if there is a manifest, else zip's own."""
    manifest = manifest_path(path)
    if manifest.is_file():
        try:
            wanted = json.loads(manifest.read_text())
            size, digest = int(wanted["size"]), str(wanted["sha256"])
        except (ValueError, KeyError, TypeError):
            return f"its manifest {manifest.name} is not readable"
        if path.stat().st_size != size:
            return f"{path.stat().st_size} bytes, its manifest says {size}"
        if file_sha256(path) != digest:
            return "its checksum differs from its manifest's"
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            return f"the record {bad} fails its CRC" if bad else None
        except Exception as error:  # zipfile raises many classes on damaged files
            return first_line(error)
    return None


def checkpoint_digest(path):
    """sha256 of a checkpoint that `load_checkpoint` has read: its manifest's, which was compared, or the file's own."""
    manifest = manifest_path(Path(path))
    return json.loads(manifest.read_text())["sha256"] if manifest.is_file() else file_sha256(path)


def first_line(error):
    return str(error).partition("\n")[0] or "no message"


def manifest_path(path):
    return path.with_suffix(".json")


# ------------------------------------------------------------------------------------------------ networks

def load_net(path, which, config_path, overrides, device):
    """Load a checkpoint's network, for `prepare_network`: (net, its Config, class names or None, latents as `fit_decoder` takes them).

    config_path: a YAML file, or None if the checkpoint carries its config. overrides: key=value, over both.
    """
    checkpoint = load_checkpoint(path)
    weights = weights_of(checkpoint, which, path)
    if config_path is None and "config" not in checkpoint:
        raise UserError(f"checkpoint {path} carries no config; describe its network with --config "
                        f"(configs/test/ is for the published ones)")
    config = load_config(config_path, overrides, config_of(checkpoint, path))
    net = build_model(**model_arguments(config)).to(device).eval().requires_grad_(False)
    load_weights_into(net, weights, path)
    class_names = checkpoint.get("class_names")
    if class_names is None and net.num_classes == 1000:
        class_names = load_imagenet_class_names()
    return net, config, class_names, checkpoint.get("latents", {})


def config_of(checkpoint, path):
    """The Config that a checkpoint carries, of this version or an older one; the defaults if it carries none."""
    gone = []
    try:
        config = from_dict(checkpoint.get("config", {}), gone=gone)
    except UserError as error:
        raise UserError(f"checkpoint {path}, in its config: {error}") from error
    if gone:
        say(f"checkpoint {path} was written by an older version; without effect today: {some_of(gone)}")
    return config


def prepare_network(net, config, device):
    """Bring a network that is only sampled with into the precision of a SampleConfig, and compile its blocks if that says so."""
    amp = effective_amp(config.amp, device)
    if amp != "no":
        net.cast_layers(DTYPES[amp])
    if use_compile(config.compile, device):
        say("compiling the blocks: about 1 minute on the first batch")
        net.compile_blocks()  # for the first batch size; the next size recompiles once, for all sizes


def fit_decoder(autoencoder, latents, whose, vae_path):
    """Give an autoencoder the scale and shift of the latents that it is to decode: the latents' description owns them.

    latents: {"scale": number or one per channel, "shift": the same, "vae": digest}, of a checkpoint or a data set; "" and what is
    missing are unknown. whose: names them in messages. Raises UserError if another autoencoder has made them. If it is unknown
    which one has, and the numbers differ, that is said.
    """
    made_by, wanted = latents.get("vae"), "give the autoencoder that made the latents (--vae or vae.path=...)"
    if made_by and made_by != autoencoder.digest:
        raise UserError(f"{whose} has latents of the autoencoder {made_by}, but vae.path={vae_path} is {autoencoder.digest}; {wanted}")
    for name in ("scale", "shift"):
        theirs, own = latents.get(name), getattr(autoencoder, name)
        if theirs is None:
            continue
        setattr(autoencoder, name, theirs)
        if not made_by and not np.allclose(theirs, own, rtol=1e-5):
            say_once(f"{whose} has latents of {name} {theirs} by an unknown autoencoder; they are decoded with that {name}, not with "
                     f"the {own} of vae.path={vae_path}. If the images look wrong, {wanted}")
