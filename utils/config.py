"""The configuration: one typed tree for all scripts, read from YAML, overridden by key=value. No torch in here.

OmegaConf reads YAML and overrides; it is loaded when there are some, so that --help need not wait for it.

A config is checked completely before anything is done with it: unknown keys (with the nearest right one), wrong types and
impossible combinations are ValueErrors that name the key, the value and what is wanted.
"""

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

from utils.cli import UserError

AMP_CHOICES = ("fp16", "bf16", "no")
LR_SCHEDULES = ("constant", "cosine", "linear")
MASK_SCHEDULES = ("constant", "linear", "exp", "cosine2", "cosine3", "cosine4", "cosine5", "cosine6")
SOLVERS = ("edm", "ablation")
SpeedUp = Literal["embed_kept", "shuffled_decoder", "product_attention", "fused_adamw", "foreach_ema", "static_graph", "bucket_views",
                  "read_ahead", "keep_memory"]


@dataclass(frozen=True)
class ModelConfig:
    model_type: str = "DiT-XL/2"  # DiT-{S,B,L,XL,H}/{1,2,4,8}: depth, width and heads from the paper's table
    in_size: int = 32  # height and width of the latents
    in_channels: int = 4
    num_classes: int = 1000  # 0: unconditional
    use_decoder: bool = True  # False: plain DiT, the baseline
    depth: Optional[int] = None  # the next six replace the table's values
    width: Optional[int] = None
    num_heads: Optional[int] = None
    decoder_depth: int = 8
    decoder_width: int = 512
    decoder_num_heads: int = 16


@dataclass(frozen=True)
class DataConfig:
    root: str = ""  # stored latents (train_latent.py) or images (train.py)
    xflip: bool = False  # add the mirrored copy of every sample
    resolution: int = 256  # train.py: images are centre-cropped to this many pixels
    num_workers: int = 4  # train.py: threads that decode images


@dataclass(frozen=True)
class VAEConfig:
    path: str = "assets/autoencoder_kl.pth"  # diffusers folder, hub id or latent-diffusion .pth
    amp: str = "no"  # precision of encoding in train.py and of decoding: no | bf16 | fp16
    batchsize: int = 32  # images decoded at once; smaller batches are tried when memory runs out


@dataclass(frozen=True)
class TrainConfig:
    batchsize: int = 128  # images per process and optimizer step
    grad_accum: int = 1  # rounds that the batch is split into
    max_num_steps: int = 2_000_000  # optimizer steps of this run, counted from the checkpoint that it starts from
    lr: float = 1e-4
    lr_schedule: str = "constant"  # constant | cosine | linear, after the warm-up, down to 0 at max_num_steps
    warmup_images: int = 0  # the learning rate rises linearly over this many images
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # largest gradient norm; 0: off
    ema_decay: float = 0.9999
    amp: str = "fp16"  # fp16 (with loss scaling) | bf16 | no; fp16 is for GPUs, a CPU runs float32 instead
    tf32: bool = True  # let float32 matrix products round their inputs to TF32 on GPUs
    compile: Literal["auto", True, False] = "auto"  # torch.compile, block by block; auto: on GPUs where it is possible, never on a CPU
    cuda_graphs: bool = False  # with compile=true: replay each block's kernels as CUDA graphs, for small batches on fast GPUs
    token_multiple: int = 1  # round the number of kept tokens to a multiple: few shapes, which CUDA graphs need (16)
    deterministic: bool = True  # deterministic GPU kernels, which bit-exact resume needs
    activation_checkpointing: bool = False  # less memory, a third more compute
    switch_off: tuple[SpeedUp, ...] = ()  # what to do without, to check or to measure it; benchmarks/README.md says what each is
    mask_ratio: float = 0.5  # share of the patches that the encoder does not see, at the start
    mask_ratio_min: float = 0.0  # the share that decaying schedules end at
    mask_ratio_fn: str = "constant"  # constant | linear | exp | cosine2 ... cosine6
    mae_loss_coef: float = 0.1
    class_dropout_prob: float = 0.1
    P_mean: float = -1.2  # ln(sigma) ~ N(P_mean, P_std^2)
    P_std: float = 1.2
    seed: int = 0
    max_bad_steps: int = 20  # steps with NaN or Inf gradients in a row that end the run
    timeout_s: float = 1800.0  # longest wait for another process

    def uses(self, speed_up):
        return speed_up not in self.switch_off

    @property
    def mask_ratio_varies(self):
        return self.mask_ratio_fn not in ("constant", "const") and self.mask_ratio > self.mask_ratio_min


@dataclass(frozen=True)
class SampleConfig:
    solver_set: str = "edm"  # edm: EDM's Heun sampler | ablation: EDM's ablation sampler with the options below
    num_steps: int = 40
    cfg_scale: float = 1.0  # 1: no guidance
    cfg_interval: Optional[tuple[float, float]] = None  # guide only for sigma in (lo, hi]
    sigma_min: Optional[float] = None  # null: 0.002, or what the discretization implies
    sigma_max: Optional[float] = None  # null: 80, or what the discretization implies
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = float("inf")
    S_noise: float = 1.0
    solver: str = "heun"  # ablation only: euler | heun
    discretization: str = "edm"  # ablation only: vp | ve | iddpm | edm
    schedule: str = "linear"  # ablation only: vp | ve | linear
    scaling: str = "none"  # ablation only: vp | none
    batchsize: int = 50  # images sampled at once, per process
    amp: str = "no"  # precision of the network: no (float32) | bf16 | fp16
    compile: bool = False  # torch.compile, block by block; pays for many images: the first ones wait for it


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # training: steps between evaluations; 0: never
    ref_path: str = ""  # reference statistics or images
    metrics: str = ""  # comma-separated: fid,sfid,is,precision,recall,kid; empty: fid in training, else all that ref_path can serve
    embedding: str = "inception"  # inception | pixels | classifier folder | timm model name
    weights: Optional[str] = None  # weights file of the embedding; null: its place in assets/
    num_images: int = 5000
    num_steps: int = 18  # sampler steps of an evaluation during training


@dataclass(frozen=True)
class LogConfig:
    results_dir: str = "results"
    exp_name: str = ""  # folder below results_dir; empty: the config file's name
    log_every: int = 100  # steps between lines of loss and speed
    ckpt_every: int = 50_000  # steps between checkpoints; the last step is always saved
    keep_last: int = 3  # checkpoints kept besides those of keep_every; 0: all
    keep_every: int = 0  # checkpoints at multiples of this many steps are kept for ever; 0: none
    sample_every: int = 0  # steps between sample grids from the EMA weights; 0: only at the end
    num_grid_images: int = 36
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


def load_config(path=None, overrides=(), base=None):
    """Read a YAML file (None: only defaults), apply `key=value` overrides, check everything.

    base: a Config whose values stand where neither the file nor an override says otherwise.
    Returns a frozen Config. Raises FileNotFoundError, or ValueError naming the key, the value and what is wanted.
    """
    layers = [to_dict(base)] if base is not None else []
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--config {path}: no such file{_similar_files(path)}")
        layers.append(_read_yaml(path))
    layers.append(_parse_overrides(overrides))
    config = from_dict(*layers)
    return config


def from_dict(*layers):
    """Merge plain nested dicts, later ones winning, into a checked Config."""
    values = {}
    for layer in layers:
        _merge(values, layer, "")
    sections = {}
    for section in dataclasses.fields(Config):
        sections[section.name] = _build(section.type, values.get(section.name, {}), section.name)
    config = Config(**sections)
    _validate(config)
    return config


def to_dict(config):
    """Plain nested dict of a Config: what is saved in checkpoints and config.yaml."""
    plain = dataclasses.asdict(config)
    return {name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in plain.items()}


def to_yaml(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _read_yaml(path):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    except Exception as error:  # PyYAML's errors have no common base that OmegaConf promises
        if "yaml" not in type(error).__module__:
            raise
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: wanted sections ({', '.join(_sections())}), found {type(content).__name__}")
    return content


def _parse_overrides(overrides):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for text in overrides:
        if not re.match(r"^[\w.]+=", text):
            raise UserError(f"argument {text!r} is not understood; overrides look like train.lr=1e-4, options like --config")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"override: {error}") from error


def _sections():
    return [section.name for section in dataclasses.fields(Config)]


def _merge(target, source, prefix):
    """Put `source` over `target`; only keys of the schema are let in."""
    for section, values in source.items():
        if section not in _sections():
            raise UserError(f"unknown key {section!r}; {_nearest(section)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{section}={values!r} is a section; set its keys, as in {section}.{_keys(section)[0]}=...")
        for key in values:
            if key not in _keys(section):
                raise UserError(f"unknown key '{section}.{key}'; {_nearest(f'{section}.{key}')}")
        target.setdefault(section, {}).update(values)


def _keys(section):
    section_type = Config.__dataclass_fields__[section].type
    return [option.name for option in dataclasses.fields(section_type)]


def _nearest(key):
    known = [f"{section}.{name}" for section in _sections() for name in _keys(section)]
    by_name = [full for full in known if full.split(".")[-1] == key.split(".")[-1]]
    close = by_name or difflib.get_close_matches(key, known + _sections(), n=1, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else f"the sections are {', '.join(_sections())}"


def _build(section_type, values, section):
    typed = {option.name: _coerce(f"{section}.{option.name}", values[option.name], option.type)
             for option in dataclasses.fields(section_type) if option.name in values}
    return section_type(**typed)


def _coerce(key, value, wanted):
    """`value` as the annotated type; ints pass for floats, lists for tuples, nothing else is converted."""
    if typing.get_origin(wanted) is typing.Union:
        if value is None:
            return None
        wanted = next(choice for choice in typing.get_args(wanted) if choice is not type(None))
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        if not any(type(value) is type(choice) and value == choice for choice in choices):  # 1 is not true
            raise UserError(f"{key}={value!r}: wanted one of {', '.join(str(choice).lower() for choice in choices)}")
        return value
    if typing.get_origin(wanted) is tuple:
        parts = typing.get_args(wanted)
        if parts[-1] is Ellipsis:
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{key}={value!r}: wanted a list, as in {key}=[{typing.get_args(parts[0])[0]}]")
            return tuple(_coerce(key, item, parts[0]) for item in value)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise UserError(f"{key}={value!r}: wanted a list of {len(parts)} numbers, as in {key}=[0.9,0.999]")
        return tuple(_coerce(key, item, part) for item, part in zip(value, parts))
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str) and value.lower() in ("inf", ".inf"):
        return float("inf")
    if wanted is str and isinstance(value, bool) and key.endswith("amp"):
        return "no" if value is False else "fp16"  # YAML 1.1 reads an unquoted `no` as false
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{key}={value!r}: wanted {names[wanted]}, got {type(value).__name__}")
    return value


def _validate(config):
    model, data, train, sample, log = config.model, config.data, config.train, config.sample, config.log
    _choice("train.amp", train.amp, AMP_CHOICES)
    _choice("sample.amp", sample.amp, AMP_CHOICES)
    _choice("vae.amp", config.vae.amp, AMP_CHOICES)
    _choice("train.lr_schedule", train.lr_schedule, LR_SCHEDULES)
    _choice("train.mask_ratio_fn", train.mask_ratio_fn, MASK_SCHEDULES + tuple(_short_names()))
    _choice("sample.solver_set", sample.solver_set, SOLVERS)
    for section, keys in _POSITIVE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            if value is not None and not value > 0:
                raise UserError(f"{section}.{key}={value} must be above 0")
    for section, keys in _NOT_NEGATIVE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            if not value >= 0:
                raise UserError(f"{section}.{key}={value} must not be negative")
    for key, value in (("train.mask_ratio", train.mask_ratio), ("train.mask_ratio_min", train.mask_ratio_min),
                       ("train.class_dropout_prob", train.class_dropout_prob), ("train.ema_decay", train.ema_decay)):
        if not 0 <= value < 1:
            raise UserError(f"{key}={value} must be at least 0 and below 1")
    if train.mask_ratio_min > train.mask_ratio:
        raise UserError(f"train.mask_ratio_min={train.mask_ratio_min} is above train.mask_ratio={train.mask_ratio}; "
                        f"schedules go from mask_ratio down to mask_ratio_min")
    if train.mask_ratio > 0 and not model.use_decoder:
        raise UserError(f"train.mask_ratio={train.mask_ratio} needs the decoder that fills in removed patches, but "
                        f"model.use_decoder=false; set train.mask_ratio=0 or model.use_decoder=true")
    if train.cuda_graphs and train.compile is not True:
        raise UserError("train.cuda_graphs=true works on compiled blocks only; set train.compile=true too")
    if train.cuda_graphs and train.grad_accum > 1:
        raise UserError(f"train.cuda_graphs=true replays into the memory that train.grad_accum={train.grad_accum} adds gradients up in; "
                        f"set train.grad_accum=1")
    if train.cuda_graphs and train.mask_ratio_varies and train.token_multiple == 1:
        raise UserError(f"train.cuda_graphs=true records a graph for every number of kept tokens, of which train.mask_ratio_fn="
                        f"{train.mask_ratio_fn} makes hundreds; set train.token_multiple=16")
    if train.batchsize % train.grad_accum:
        raise UserError(f"train.batchsize={train.batchsize} must be divisible by train.grad_accum={train.grad_accum}; "
                        f"try {_divisible_near(train.batchsize, train.grad_accum)}")
    if model.num_classes == 0 and sample.cfg_scale != 1:
        raise UserError(f"sample.cfg_scale={sample.cfg_scale} needs classes, but model.num_classes=0; set sample.cfg_scale=1")
    if sample.cfg_interval is not None and not 0 <= sample.cfg_interval[0] < sample.cfg_interval[1]:
        raise UserError(f"sample.cfg_interval={list(sample.cfg_interval)}: wanted [sigma_lo, sigma_hi] with 0 <= sigma_lo < sigma_hi")
    if config.eval.every and not config.eval.ref_path:
        raise UserError(f"eval.every={config.eval.every} needs eval.ref_path: the statistics or images to compare with")
    if data.resolution % 8:
        raise UserError(f"data.resolution={data.resolution} must be a multiple of 8")
    if "/" in log.exp_name or log.exp_name in (".", ".."):
        raise UserError(f"log.exp_name={log.exp_name!r} is a name, not a path; the place is log.results_dir")


_POSITIVE = {
    "model": ("in_size", "in_channels", "depth", "width", "num_heads", "decoder_depth", "decoder_width", "decoder_num_heads"),
    "data": ("resolution",), "vae": ("batchsize",),
    "train": ("batchsize", "grad_accum", "max_num_steps", "lr", "P_std", "token_multiple", "max_bad_steps", "timeout_s"),
    "sample": ("num_steps", "batchsize", "cfg_scale", "sigma_min", "sigma_max", "rho", "S_noise"),
    "eval": ("num_images", "num_steps"),
    "log": ("log_every", "ckpt_every", "num_grid_images"),
}
_NOT_NEGATIVE = {
    "model": ("num_classes",), "data": ("num_workers",),
    "train": ("warmup_images", "weight_decay", "grad_clip", "mae_loss_coef", "seed"),
    "sample": ("S_churn", "S_min"),
    "eval": ("every",), "log": ("keep_last", "keep_every", "sample_every"),
}


def _short_names():
    return [name.replace("cosine", "cos") for name in MASK_SCHEDULES if name.startswith("cosine")] + ["const"]


def _choice(key, value, choices):
    if value not in choices:
        raise UserError(f"{key}={value!r}: wanted one of {', '.join(choices)}")


def _divisible_near(number, divisor):
    low = number // divisor * divisor
    return f"{low} or {low + divisor}" if low else str(divisor)


def _similar_files(path):
    folder = Path(path).parent
    names = [str(found) for found in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), names, n=3, cutoff=0.3)
    return f"; there is {', '.join(close)}" if close else ""
