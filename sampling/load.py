"""From a checkpoint file to weights and to a network that is ready to sample.

A checkpoint is verified before use, and nothing that it contains is executed. Ours have a manifest beside them (NNNNNNN.json:
size and sha256), which training/checkpoint.py writes.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import zipfile
from pathlib import Path

import torch

from models.layers import sincos_positions
from models.maskdit import SIZES
from utils.cli import UserError
from utils.config import ModelConfig
from utils.logging import say
from utils.precision import DTYPES, effective_amp, use_compile

WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(path):
    """Read a checkpoint dict onto the CPU, ours or the published format.

    Nothing in the file is executed: only tensors, plain containers and argparse.Namespace (the published `args`) are let in.
    Raises FileNotFoundError, or ValueError saying what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    problem = damage(path)
    if problem:
        raise UserError(f"checkpoint {path} is damaged: {problem}; take another one, or download it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} is refused: {_refusal(error)}") from error
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler, with any class
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}: {first_line(error)}); "
                        f"it is damaged or not a PyTorch file") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: wanted a dict with 'model' or 'ema', found {type(content).__name__}")
    _check_types(content, path)
    return content


def _check_types(content, path):
    wanted = {"model": dict, "ema": dict, "opt": dict, "step": int, "images_seen": int, "config": dict}
    for key, kind in wanted.items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"checkpoint {path}: its {key!r} is a {type(content[key]).__name__}, wanted a {kind.__name__}")
    optimizer = content.get("opt", {})
    states, groups = optimizer.get("state", {}), optimizer.get("param_groups", [])
    if not (isinstance(states, dict) and all(isinstance(state, dict) for state in states.values()) and isinstance(groups, list)):
        raise UserError(f"checkpoint {path}: its 'opt' is not the state of an optimizer")


def load_weights(path, which="ema"):
    """State dict of a checkpoint under the published names (`model.x_embedder.proj.weight`, ...), wrapper prefixes removed.

    which: "ema" or "model". A file that is itself a state dict is returned as it is.
    Raises FileNotFoundError, or ValueError if the file is damaged or has no such weights.
    """
    return weights_of(load_checkpoint(path), which, path)


def weights_of(checkpoint, which, path):
    """The same for a checkpoint that is already loaded; `path` is for messages."""
    if which not in ("ema", "model"):
        raise UserError(f"which={which!r}: wanted 'ema' or 'model'")
    if any(key in checkpoint for key in ("ema", "model")):
        if which not in checkpoint:
            found = ", ".join(str(key) for key in checkpoint)
            raise UserError(f"checkpoint {path} has no {which!r} weights; it has {found}")
        checkpoint = checkpoint[which]
    tensors = {strip_prefixes(name): value for name, value in checkpoint.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) != len(checkpoint):
        raise UserError(f"checkpoint {path} holds no state dict: wanted names with tensors")
    return tensors


def strip_prefixes(name):
    """'module._orig_mod.model.pos_embed' -> 'model.pos_embed': what DDP and torch.compile put before names."""
    while name.startswith(WRAPPER_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def steps_done(checkpoint):
    """Optimizer steps behind a checkpoint: ours say so; the published ones hold it in AdamW's state. 0 if neither does."""
    if "step" in checkpoint:
        return int(checkpoint["step"])
    states = checkpoint.get("opt", {}).get("state", {})
    return max((int(state["step"]) for state in states.values() if "step" in state), default=0)


def load_weights_into(net, weights, path, skip_mismatched=False):
    """Load a state dict into `net`. Raises ValueError listing by name what is missing, unknown or of another shape.

    skip_mismatched: say it instead, and leave those out; position tables of another grid are interpolated to this one.
    """
    own = net.state_dict()
    if skip_mismatched:
        weights = {name: _fit_positions(name, value, own, path) for name, value in weights.items()}
    fits = {name: name in own and value.shape == own[name].shape for name, value in weights.items()}
    misfits = {"missing": own.keys() - weights.keys(), "unknown": weights.keys() - own.keys(),
               "other shape": {f"{name} {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
                               for name in weights.keys() & own.keys() if not fits[name]}}
    problems = "; ".join(f"{kind}: {_some_of(sorted(names))}" for kind, names in misfits.items() if names)
    if problems and not skip_mismatched:
        raise UserError(f"checkpoint {path} does not fit the model; {problems}. "
                        f"Check the model section of the config, or leave these out with --skip_mismatched")
    if not any(fits.values()):
        raise UserError(f"checkpoint {path} has nothing that fits the model; {problems}")
    if problems:
        say(f"checkpoint {path}: left at fresh values or out; {problems}")
    net.load_state_dict({name: value for name, value in weights.items() if fits[name]}, strict=False)


def _fit_positions(name, value, own, path):
    """A fixed position table of another grid, made anew in units of that grid; anything else as it is."""
    if not name.endswith("pos_embed") or name not in own or value.dim() != 3 or value.shape[2] != own[name].shape[2]:
        return value
    (old, width), new = value.shape[1:], own[name].shape[1]
    old_grid, new_grid = math.isqrt(old), math.isqrt(new)
    if old == new or old_grid**2 != old or not torch.allclose(value, sincos_positions(width, old_grid), atol=1e-3):
        return value
    say(f"checkpoint {path}: {name} is interpolated from {old_grid} x {old_grid} to {new_grid} x {new_grid} patches")
    return sincos_positions(width, new_grid, unit_grid=old_grid)


def _some_of(names, count=6):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def damage(path):
    """What is wrong with a checkpoint file, or None. With a manifest beside it the whole file is checked against it."""
    path = Path(path)
    manifest = manifest_path(path)
    if manifest.is_file():
        try:
            wanted = json.loads(manifest.read_text())
            size, digest = int(wanted["size"]), str(wanted["sha256"])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            return f"its manifest {manifest.name} is not readable"
        if path.stat().st_size != size:
            return f"{path.stat().st_size} bytes, its manifest says {size}"
        if file_sha256(path) != digest:
            return "its checksum differs from its manifest's"
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except Exception as error:  # zipfile raises many classes on damaged files
            return first_line(error)
        if bad:
            return f"the record {bad} fails its CRC"
    return None


def file_sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refusal(error):
    """Name the class that PyTorch's unpickler refused, from its long message."""
    named = re.search(r"(?:GLOBAL|class|global:?) ([\w]+\.[\w.]+)", str(error))
    what = f"it contains {named[1]}" if named else "its pickle is not readable"
    return f"{what}; only tensors, plain containers and argparse.Namespace are accepted, and nothing was executed"


def first_line(error):
    return (str(error).splitlines() or ["no message"])[0]


def manifest_path(path):
    return path.with_suffix(".json")


def infer_model_config(weights, path):
    """The ModelConfig of a state dict that comes without one, read from its shapes. Raises ValueError if they do not tell."""
    try:
        width, in_channels, patch_size, _ = weights["model.x_embedder.proj.weight"].shape
        num_tokens = weights["model.pos_embed"].shape[1]
    except KeyError as error:
        raise UserError(f"checkpoint {path} is no MaskDiT: it has no {error}") from error
    depth = _count_blocks(weights, "model.blocks.")
    letter = next((letter for letter, size in SIZES.items() if (size.depth, size.width) == (depth, width)), None)
    table = weights.get("model.y_embedder.embedding_table.weight")
    positions = weights.get("model.decoder_pos_embed")
    if letter is None or (positions is not None and positions.shape[2] != ModelConfig.decoder_width):
        raise UserError(f"checkpoint {path} (depth {depth}, width {width}) is none of the sizes S, B, L, XL, H, so its number of "
                        f"heads is unknown; describe it with --config")
    return ModelConfig(model_type=f"DiT-{letter}/{patch_size}", in_size=math.isqrt(num_tokens) * patch_size, in_channels=in_channels,
                       num_classes=0 if table is None else table.shape[1], use_decoder=positions is not None,
                       decoder_depth=_count_blocks(weights, "model.decoder_blocks.") or ModelConfig.decoder_depth)


def _count_blocks(weights, prefix):
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def prepare_network(net, config, device):
    """Make a network that is only sampled with ready for it, as a SampleConfig says: its precision, compiled blocks."""
    amp = effective_amp(config.amp, device)
    if amp != "no":
        net.cast_layers(DTYPES[amp])
    if use_compile(config.compile, device):
        net.compile_blocks()  # for the batch that comes first; for any other (without guidance, the last one) once more, for all sizes
