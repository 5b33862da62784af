"""The configuration of all scripts: one typed tree, read from YAML, changed by key=value. No torch in here.

OmegaConf merges the layers and checks types. It is imported only when a config is read, so that --help does not wait for it.
A config is checked completely before any work: every mistake is a UserError that names key, value and what is wanted.
"""

import dataclasses
import difflib
import math
import operator
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from utils.cli import UserError

Amp = Literal["fp16", "bf16", "no"]
MASK_SCHEDULES = ("constant", "linear", "exp", "cosine2", "cosine3", "cosine4", "cosine5", "cosine6")
SHORT_NAMES = ("const", "cos2", "cos3", "cos4", "cos5", "cos6")  # of the same, in published configs
SpeedUp = Literal["embed_kept", "shuffled_decoder", "product_attention", "fused_adamw", "foreach_ema", "static_graph", "bucket_views",
                  "read_ahead", "keep_memory"]
GONE = {"sample.solver_set": "set sample.sampler instead"}  # keys of older versions, and what to do about them


LIMITS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt}


def number(default, **limits):
    """A key whose numbers must lie within limits: above, at_least, below; infinite=True lets infinity in. null is always let in."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class ModelConfig:
    model_type: str = "DiT-XL/2"  # DiT-{S,B,L,XL,H}/{1,2,4,8}: depth, width and heads from the paper's table; or a network of your own
    in_size: int = number(32, above=0)  # height and width of the latents
    in_channels: int = number(4, above=0)
    num_classes: int = number(1000, at_least=0)  # 0: no classes, so no guidance either
    use_decoder: bool = True  # False: plain DiT, the baseline
    depth: Optional[int] = number(None, above=0)  # this and the next two replace the table's values
    width: Optional[int] = number(None, above=0)
    num_heads: Optional[int] = number(None, above=0)
    decoder_depth: int = number(8, above=0)
    decoder_width: int = number(512, above=0)
    decoder_num_heads: int = number(16, above=0)
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of the network's class, as in model.options.window=4


@dataclass(frozen=True)
class DataConfig:
    root: str = ""  # stored latents (train_latent.py) or images (train.py)
    xflip: bool = False  # add the mirrored copy of every sample
    scale: Any = number(None, above=0)  # latents are (encoded - shift) * scale; a number or one per channel; null: what the data say
    shift: Any = number(None)
    resolution: int = number(256, above=0)  # train.py: images are centre-cropped to this many pixels
    num_workers: int = number(4, at_least=0)  # train.py: threads that decode images


@dataclass(frozen=True)
class VAEConfig:
    path: str = "assets/autoencoder_kl.pth"  # diffusers folder, hub id or latent-diffusion .pth
    amp: Amp = "no"  # precision of encoding in train.py and of decoding
    batchsize: int = number(32, above=0)  # images decoded at once; smaller batches are tried when memory runs out


@dataclass(frozen=True)
class TrainConfig:
    loss: str = "edm"  # a name in models.LOSSES
    batchsize: int = number(128, above=0)  # images per process and optimizer step
    grad_accum: int = number(1, above=0)  # rounds that the batch is split into
    max_num_steps: int = number(2_000_000, above=0)  # optimizer steps of this run, counted from the checkpoint that it starts from
    lr: float = number(1e-4, above=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up; the others fall to 0 at max_num_steps
    warmup_images: int = number(0, at_least=0)  # the learning rate rises linearly over this many images
    betas: tuple[float, float] = number((0.9, 0.999), at_least=0, below=1)
    weight_decay: float = number(0.0, at_least=0)
    grad_clip: float = number(0.0, at_least=0)  # largest gradient norm; 0: off
    ema_decay: float = number(0.9999, at_least=0, below=1)
    amp: Amp = "fp16"  # fp16 uses loss scaling and is for GPUs: a CPU runs float32 instead
    tf32: bool = True  # let float32 matrix products round their inputs to TF32 on GPUs
    compile: Literal["auto", True, False] = "auto"  # torch.compile, block by block; auto: on GPUs where it is possible, never on a CPU
    cuda_graphs: bool = False  # going away with switch_off, as soon as training and benchmarks do not read them any more
    switch_off: tuple[SpeedUp, ...] = ()
    deterministic: bool = True  # deterministic GPU kernels, which bit-exact resume needs
    activation_checkpointing: bool = False  # less memory, a third more compute
    mask_ratio: float = number(0.5, at_least=0, below=1)  # share of the patches that the encoder does not see, at the start
    mask_ratio_min: float = number(0.0, at_least=0, below=1)  # the share that falling schedules end at
    mask_ratio_fn: Literal[MASK_SCHEDULES + SHORT_NAMES] = "constant"
    mae_loss_coef: float = number(0.1, at_least=0)  # weight of the loss on removed patches
    class_dropout_prob: float = number(0.1, at_least=0, below=1)  # how often the class is hidden, which guidance needs
    P_mean: float = number(-1.2)  # ln(sigma) ~ N(P_mean, P_std^2)
    P_std: float = number(1.2, above=0)
    seed: int = number(0, at_least=0, below=2**64)
    max_bad_steps: int = number(20, above=0)  # steps with NaN or Inf gradients in a row that end the run
    timeout_s: float = number(1800.0, above=0)  # longest wait for another process

    def uses(self, speed_up):
        return speed_up not in self.switch_off

    @property
    def mask_ratio_varies(self):
        return self.mask_ratio_fn not in ("constant", "const") and self.mask_ratio > self.mask_ratio_min


@dataclass(frozen=True)
class SampleConfig:
    sampler: Optional[str] = None  # edm | ablation | another name in models.SAMPLERS; null: ablation if one of its choices is set, else edm
    num_steps: int = number(40, above=0)
    cfg_scale: float = number(1.0, above=0)  # 1: no guidance
    cfg_interval: Optional[tuple[float, float]] = number(None, at_least=0, infinite=True)  # guide only for sigma in (lo, hi]
    sigma_min: Optional[float] = number(None, above=0)  # null: 0.002, or what the discretization implies
    sigma_max: Optional[float] = number(None, above=0)  # null: 80, or what the discretization implies
    rho: float = number(7.0, above=0)
    S_churn: float = number(0.0, at_least=0)
    S_min: float = number(0.0, at_least=0)
    S_max: float = number(float("inf"), at_least=0, infinite=True)
    S_noise: float = number(1.0, above=0)
    solver: Optional[Literal["euler", "heun"]] = None  # this and the next three are for the ablation sampler; null: heun
    discretization: Optional[Literal["vp", "ve", "iddpm", "edm"]] = None  # null: edm
    schedule: Optional[Literal["vp", "ve", "linear"]] = None  # null: linear
    scaling: Optional[Literal["vp", "none"]] = None  # null: none
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of the sampler, as in sample.options.order=3
    batchsize: int = number(50, above=0)  # images sampled at once, per process
    amp: Amp = "no"  # precision of the network
    compile: bool = False  # torch.compile, block by block; pays for many images: the first ones wait for it


@dataclass(frozen=True)
class EvalConfig:
    every: int = number(0, at_least=0)  # training: steps between evaluations; 0: never
    ref_path: str = ""  # reference statistics or images
    metrics: str = ""  # comma-separated: fid,sfid,is,precision,recall,kid; empty: fid in training, else all that ref_path can serve
    embedding: str = "inception"  # inception | pixels | classifier folder | timm model name
    weights: Optional[str] = None  # weights file of the embedding; null: its place in assets/
    num_images: int = number(5000, above=0)
    num_steps: int = number(18, above=0)  # sampler steps of an evaluation during training


@dataclass(frozen=True)
class LogConfig:
    results_dir: str = "results"
    exp_name: str = ""  # folder below results_dir; empty: the config file's name
    log_every: int = number(100, above=0)  # steps between lines of loss and speed
    ckpt_every: int = number(50_000, above=0)  # steps between checkpoints; the last step is always saved
    keep_last: int = number(3, at_least=0)  # checkpoints kept besides those of keep_every; 0: all
    keep_every: int = number(0, at_least=0)  # checkpoints at multiples of this many steps are kept for ever; 0: none
    sample_every: int = number(0, at_least=0)  # steps between sample grids from the EMA weights; 0: only at the end
    num_grid_images: int = number(36, above=0)
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS = {section.name: section.type for section in dataclasses.fields(Config)}
KEYS = {f"{section}.{key.name}": key for section, kind in SECTIONS.items() for key in dataclasses.fields(kind)}


# ------------------------------------------------------------------------------------------------ reading and writing

def load_config(path=None, overrides=(), base=None):
    """Read a YAML file (None: defaults only), apply `key=value` overrides and check everything; returns a Config.

    base: a Config whose values hold where neither the file nor an override says otherwise.
    """
    layers = [to_dict(base)] if base is not None else []
    if path is not None:
        layers.append(_read_yaml(Path(path)))
    return from_dict(*layers, *map(_parse_override, overrides))


def from_dict(*layers, forgive=False):
    """Merge nested dicts, later ones winning, into a checked Config.

    forgive: leave out keys that are gone, for configs of older checkpoints; `gone_keys` names them, so that a script can say so.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(Config)
    for section in SECTIONS:
        OmegaConf.set_readonly(tree[section], False)  # until the frozen dataclasses are made of it
    for name, value in (pair for layer in layers for pair in _pairs(_renewed(layer) if forgive else layer)):
        if value is False and "no" in typing.get_args(KEYS[name].type):
            value = "no"  # YAML reads an unquoted `no` as false
        try:
            OmegaConf.update(tree, name, value)
        except (OmegaConfBaseException, OverflowError) as error:
            raise UserError(f"{name}={value!r}: wanted {_wanted(name)}, got {type(value).__name__}") from error
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation such as ${train.lrr} that leads nowhere
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check(config)
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


def gone_keys(values):
    """Full names of the keys of an older config that mean nothing today (sample.solver_set does: it became sample.sampler)."""
    names = [f"{section}.{key}" for section, keys in values.items() for key in keys]
    return [name for name in names if name not in KEYS and name != "sample.solver_set"]


def notes(config, *sections):
    """Sentences about settings of these sections that are no mistake but do less than they seem to; scripts tell them at the start."""
    train, sample = config.train, config.sample
    found, tokens = [], _num_tokens(config.model)
    if "train" in sections and tokens and tokens * (1 - train.mask_ratio) < 1:
        found.append(f"train.mask_ratio={train.mask_ratio} would keep less than one of {tokens} patches: one is kept")
    if "train" in sections and train.mask_ratio_min and train.mask_ratio_fn in ("constant", "const"):
        found.append(f"train.mask_ratio_min={train.mask_ratio_min} has no effect, because train.mask_ratio_fn is constant")
    if "sample" in sections and not config.model.num_classes and sample.cfg_scale != 1:
        found.append(f"sample.cfg_scale={sample.cfg_scale} has no effect: without classes (model.num_classes=0) there is no guidance")
    elif "sample" in sections and sample.cfg_interval and sample.cfg_scale == 1:
        found.append(f"sample.cfg_interval={list(sample.cfg_interval)} has no effect: sample.cfg_scale=1 turns guidance off")
    return found


def _read_yaml(path):
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file{_similar_files(path)}") from None
    except OSError as error:  # a folder, or a file that may not be read
        raise UserError(f"--config {path} cannot be read ({error.strerror}); give a YAML file") from error
    except Exception as error:  # whatever the parsers raise is about the text of this file
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: wanted sections ({', '.join(SECTIONS)}), found {type(content).__name__}")
    return content


def _parse_override(text):
    from omegaconf import OmegaConf

    if not re.match(r"[\w.]+=", text):
        raise UserError(f"argument {text!r} is not understood; overrides look like train.lr=1e-4, options like --config")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except Exception as error:  # whatever the parsers raise is about this text
        raise UserError(f"{text!r} cannot be read ({' '.join(str(error).split())}); overrides look like train.betas=[0.9,0.99]") from error


def _similar_files(path):
    names = [str(found) for found in path.parent.glob("*.yaml")]
    close = difflib.get_close_matches(str(path), names, n=3, cutoff=0.3)
    return f"; there is {', '.join(close)}" if close else ""


# ------------------------------------------------------------------------------------------------ keys and types

def _pairs(layer):
    """Yield ("section.key", value) of a nested dict; every key must be one of the schema."""
    for section, values in layer.items():
        if section not in SECTIONS:
            raise UserError(f"unknown key {section!r}; {_nearest(str(section))}")
        if not isinstance(values, (dict, type(None))):
            example = dataclasses.fields(SECTIONS[section])[0].name
            raise UserError(f"{section}={values!r} is a section; set its keys, as in {section}.{example}=...")
        for key, value in (values or {}).items():
            if f"{section}.{key}" not in KEYS:
                raise UserError(f"unknown key '{section}.{key}'; {_nearest(f'{section}.{key}')}")
            yield f"{section}.{key}", value


def _renewed(layer):
    """A config of an older version in the keys of today."""
    renewed = {section: {key: value for key, value in layer.get(section, {}).items() if f"{section}.{key}" in KEYS} for section in SECTIONS}
    solver_set = layer.get("sample", {}).get("solver_set")
    if solver_set == "ablation":
        renewed["sample"]["sampler"] = "ablation"
    elif solver_set is not None:  # the choices of the other sampler were saved too, but not used
        renewed["sample"] |= dict.fromkeys(("solver", "discretization", "schedule", "scaling"))
    return renewed


def _nearest(key):
    if key in GONE:
        return f"it is gone: {GONE[key]}"
    by_name = [full for full in KEYS if full.split(".")[-1] == key.split(".")[-1]]
    close = by_name or difflib.get_close_matches(key, [*KEYS, *SECTIONS], n=1, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else f"the sections are {', '.join(SECTIONS)}"


def _wanted(name):
    """In words, what values the key takes."""
    kind, or_null = KEYS[name].type, ""
    if typing.get_origin(kind) is typing.Union:
        kind, or_null = typing.get_args(kind)[0], " or null"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(str(choice).lower() for choice in typing.get_args(kind))}{or_null}"
    if typing.get_origin(kind) is tuple:
        return f"a list of 2 numbers, as in {name}=[0.9,0.999]{or_null}"
    if typing.get_origin(kind) is dict:
        return f"names and values, as in {name}.size=3"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind] + or_null


# ------------------------------------------------------------------------------------------------ limits and combinations

def _check(config):
    model, data, train, sample, log = config.model, config.data, config.train, config.sample, config.log
    for name, key in KEYS.items():
        section = name.partition(".")[0]
        _check_limits(name, getattr(getattr(config, section), key.name), key.metadata)
    _check_sizes(model)
    for key, value in (("scale", data.scale), ("shift", data.shift)):
        numbers = value if isinstance(value, list) else [value] * model.in_channels
        if value is not None and (len(numbers) != model.in_channels or not all(type(number) in (int, float) for number in numbers)):
            raise UserError(f"data.{key}={value!r}: wanted a number, or a list of model.in_channels={model.in_channels} numbers")
    for section, options in (("model", model.options), ("sample", sample.options)):
        for key in options:
            if f"{section}.{key}" in KEYS:
                raise UserError(f"{section}.options.{key}={options[key]!r} hides a key of its own; set {section}.{key}")
    if train.mask_ratio_min > train.mask_ratio:
        raise UserError(f"train.mask_ratio_min={train.mask_ratio_min} is above train.mask_ratio={train.mask_ratio}; "
                        f"schedules go from mask_ratio down to mask_ratio_min")
    if train.mask_ratio > 0 and not model.use_decoder:
        raise UserError(f"train.mask_ratio={train.mask_ratio} needs the decoder that fills in removed patches, but "
                        f"model.use_decoder=false; set train.mask_ratio=0 or model.use_decoder=true")
    if train.batchsize % train.grad_accum:
        raise UserError(f"train.batchsize={train.batchsize} must be divisible by train.grad_accum={train.grad_accum}; "
                        f"try {_multiples_near(train.batchsize, train.grad_accum)}")
    if sample.cfg_interval is not None and not sample.cfg_interval[0] < sample.cfg_interval[1]:
        raise UserError(f"sample.cfg_interval={list(sample.cfg_interval)}: wanted [sigma_lo, sigma_hi] with sigma_lo below sigma_hi")
    if sample.sigma_min and sample.sigma_max and not sample.sigma_min < sample.sigma_max:
        raise UserError(f"sample.sigma_min={sample.sigma_min} must be below sample.sigma_max={sample.sigma_max}")
    if sample.S_min > sample.S_max:
        raise UserError(f"sample.S_min={sample.S_min} must not be above sample.S_max={sample.S_max}")
    if config.eval.every and not config.eval.ref_path:
        raise UserError(f"eval.every={config.eval.every} needs eval.ref_path: the statistics or images to compare with")
    if data.resolution % 8:
        raise UserError(f"data.resolution={data.resolution} must be a multiple of 8; try {_multiples_near(data.resolution, 8)}")
    if "/" in log.exp_name or log.exp_name in (".", ".."):
        raise UserError(f"log.exp_name={log.exp_name!r} is a name, not a path; the place is log.results_dir")


def _check_limits(name, value, limits):
    """Hold a number, or every number of a list, against the limits of its key."""
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if type(number) not in (int, float):
            continue
        if number != number or (number in (math.inf, -math.inf) and not limits.get("infinite")):
            raise UserError(f"{name}={value} must be a finite number")
        if not all(LIMITS[word](number, limit) for word, limit in limits.items() if word in LIMITS):
            wanted = " and ".join(f"{word.replace('_', ' ')} {limit}" for word, limit in limits.items() if word in LIMITS)
            raise UserError(f"{name}={value} must be {wanted}")


def _check_sizes(model):
    """Check what is known without the network's class: whether the sizes of a DiT divide."""
    patch = _patch_size(model)
    if patch is None:
        return
    if model.in_size % patch:
        raise UserError(f"model.in_size={model.in_size} must be divisible by the patch size of "
                        f"model.model_type={model.model_type}; try {_multiples_near(model.in_size, patch)}")
    for prefix in ("", "decoder_") if model.use_decoder else ("",):
        width, heads = getattr(model, f"{prefix}width"), getattr(model, f"{prefix}num_heads")
        if width and heads and width % heads:
            raise UserError(f"model.{prefix}width={width} must be divisible by model.{prefix}num_heads={heads}; "
                            f"try {_multiples_near(width, heads)}")


def _patch_size(model):
    """N of a model_type like DiT-S/N; None for networks with names of another kind."""
    named = re.fullmatch(r"DiT-\w+/([1-9]\d*)", model.model_type)
    return int(named[1]) if named else None


def _num_tokens(model):
    patch = _patch_size(model)
    return (model.in_size // patch) ** 2 if patch else None


def _multiples_near(number, divisor):
    low = number // divisor * divisor
    return f"{low} or {low + divisor}" if low else str(divisor)
