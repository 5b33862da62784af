"""Read the config of a script: YAML files, changed by key=value, into the frozen tree of utils/schema.py. No torch in here.

OmegaConf merges the layers and checks types. It is imported only when a config is read, so that --help does not wait for it.
A config is checked completely before any work: every mistake is a UserError that names key, value and what is wanted.
"""

import dataclasses
import difflib
import re
import typing

from utils.cli import UserError
from utils.schema import KEYS, SECTIONS, Config, check


def load_config(path=None, overrides=(), base=None):
    """Read a YAML file (None: defaults only), apply `key=value` overrides and check everything; returns a Config.

    base: a Config whose values hold where neither the file nor an override says otherwise.
    """
    layers = [to_dict(base)] if base is not None else []
    if path is not None:
        layers.append(_parse("load", path, f"--config {path}"))
        if not isinstance(layers[-1], dict):
            raise UserError(f"--config {path}: wanted sections ({', '.join(SECTIONS)}), found {type(layers[-1]).__name__}")
    for text in overrides:
        if not re.match(r"[\w.]+=", text):
            raise UserError(f"argument {text!r} is not understood; see --help (settings look like train.lr=1e-4)")
        layers.append(_parse("from_dotlist", [text], text))
    return from_dict(*layers)


def from_dict(*layers, gone=None):
    """Merge nested dicts, later ones winning, into a checked Config.

    gone: a list that takes the names of keys which this version does not have, as in older checkpoints. None: they are refused.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(Config)
    for section in SECTIONS:
        OmegaConf.set_readonly(tree[section], False)  # OmegaConf takes over that the dataclasses are frozen
    for name, value in (pair for layer in layers for pair in _flat(layer).items()):
        if name not in KEYS and gone is not None:
            gone.append(name)
            continue
        if name not in KEYS:
            raise _unknown(name, value)
        if value is False and "no" in typing.get_args(KEYS[name].type):
            value = "no"  # YAML reads an unquoted `no` as false
        if value is None and KEYS[name].type is str:
            value = ""  # YAML reads nothing as null; a shell leaves nothing of vae.path=''
        try:
            OmegaConf.update(tree, name, value)
        except (OmegaConfBaseException, OverflowError) as error:
            raise UserError(f"{name}={value!r}: wanted {_in_words(KEYS[name].type)}") from error
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # such as ${train.lrr}, which leads nowhere
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    check(config)
    return config


def to_dict(config):
    """Plain nested dict of a Config: what checkpoints and config.yaml hold."""
    return {section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for section, values in dataclasses.asdict(config).items()}


def to_yaml(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def model_arguments(config):
    """The keyword arguments of models.build_model: the model section, its options, and what training says about the network."""
    arguments = dataclasses.asdict(config.model)
    options = arguments.pop("options")
    return {**arguments, "activation_checkpointing": config.train.activation_checkpointing, **options}


def _parse(reader, text, source):
    """Plain values that the OmegaConf function called `reader` makes of a path or a text. source: what the message calls it."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(getattr(OmegaConf, reader)(text))
    except Exception as error:  # whatever the parsers raise is about this text
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{source} cannot be read as YAML: {reason}") from error


def _flat(layer):
    """{"section.key": value} of a nested dict."""
    flat = {}
    for section, keys in layer.items():
        if isinstance(keys, dict):
            flat |= {f"{section}.{key}": value for key, value in keys.items()}
        elif keys is not None or section not in SECTIONS:  # a section without keys is fine
            flat[str(section)] = keys
    return flat


def _in_words(kind):
    """What a key of this type takes: "one of euler, heun, or null" for Optional[Literal["euler", "heun"]]."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return f"{_in_words(parts[0])}, or null"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, parts))}".replace("True, False", "true, false")
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
            tuple[float, float]: "2 numbers, as in [0.1,0.9]"}.get(kind, "keys with values")


def _unknown(name, value):
    """The UserError for a name that is no key, with the nearest one."""
    if name in SECTIONS:
        return UserError(f"{name}={value!r}: this is a section; set its keys, as in {name}.KEY={value}")
    close = [key for key in KEYS if key.split(".")[1] == name.split(".")[-1]]  # the right key in the wrong section
    close = close or difflib.get_close_matches(name, [*KEYS, *SECTIONS], n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the sections are {', '.join(SECTIONS)}"
    return UserError(f"unknown key {name!r}; {hint}")
