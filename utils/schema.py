"""Every key of the config with its type, default, limits and meaning, and which values go together. No torch in here.

A new key is one line in its section here and the line that reads it. utils/config.py reads YAML files and overrides into this tree.
"""

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from utils.cli import UserError

LIMITS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt}
Amp = Literal["fp16", "bf16", "no"]
MASK_SCHEDULES = ("constant", "linear", "exp", "cosine2", "cosine3", "cosine4", "cosine5", "cosine6")
SHORT_NAMES = ("const", "cos2", "cos3", "cos4", "cos5", "cos6")  # of the same, in published configs


def number(default, **limits):
    """A key whose numbers lie within limits: above, at_least, below (infinity, or None: no limit). null is always let in."""
    limits.setdefault("below", math.inf)
    return field(default=default, metadata={word: limit for word, limit in limits.items() if limit is not None})


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
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of the network, as in model.options.window=4


@dataclass(frozen=True)
class DataConfig:
    root: str = ""  # stored latents (train_latent.py) or images (train.py)
    xflip: bool = False  # add the mirrored copy of every sample
    scale: Any = number(None, above=0)  # latents are (encoded - shift) * scale; a number or one per channel; null: what the data say
    shift: Any = number(None, above=-math.inf)
    resolution: int = number(256, above=0)  # train.py: images are centre-cropped to this many pixels
    num_workers: int = number(4, at_least=0)  # train.py: threads that decode images


@dataclass(frozen=True)
class VAEConfig:
    path: str = "assets/autoencoder_kl.pth"  # diffusers folder, hub id or latent-diffusion .pth
    amp: Amp = "no"  # precision of encoding in train.py and of decoding
    batchsize: int = number(32, above=0)  # images encoded (train.py) or decoded at once; decoding tries fewer when memory runs out


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
    deterministic: bool = True  # deterministic GPU kernels, which bit-exact resume needs
    activation_checkpointing: bool = False  # less memory, a third more compute
    shard: bool = False  # divide the optimizer's state and the average among the processes: less memory, the same numbers
    mask_ratio: float = number(0.5, at_least=0, below=1)  # share of the patches that the encoder does not see, at the start
    mask_ratio_min: float = number(0.0, at_least=0, below=1)  # the share that falling schedules end at
    mask_ratio_fn: Literal[MASK_SCHEDULES + SHORT_NAMES] = "constant"
    mae_loss_coef: float = number(0.1, at_least=0)  # weight of the loss on removed patches
    class_dropout_prob: float = number(0.1, at_least=0, below=1)  # how often the class is hidden, which guidance needs
    P_mean: float = number(-1.2, above=-math.inf)  # ln(sigma) ~ N(P_mean, P_std^2)
    P_std: float = number(1.2, above=0)
    seed: int = number(0, at_least=0, below=2**64)
    max_bad_steps: int = number(20, above=0)  # steps with NaN or Inf gradients in a row that end the run
    timeout_s: float = number(1800.0, above=0)  # longest wait for another process

    @property
    def mask_ratio_varies(self):
        return self.mask_ratio_fn not in ("constant", "const") and self.mask_ratio > self.mask_ratio_min


@dataclass(frozen=True)
class SampleConfig:
    sampler: Optional[str] = None  # edm | ablation | another name in models.SAMPLERS; null: ablation if one of its choices is set, else edm
    num_steps: int = number(40, above=0)
    cfg_scale: float = number(1.0, above=0)  # 1: no guidance
    cfg_interval: Optional[tuple[float, float]] = number(None, at_least=0, below=None)  # guide only for sigma in (lo, hi]
    sigma_min: Optional[float] = number(None, above=0)  # null: 0.002, or what the discretization implies
    sigma_max: Optional[float] = number(None, above=0)  # null: 80, or what the discretization implies
    rho: float = number(7.0, above=0)
    S_churn: float = number(0.0, at_least=0)
    S_min: float = number(0.0, at_least=0)
    S_max: float = number(math.inf, at_least=0, below=None)
    S_noise: float = number(1.0, above=0)
    solver: Optional[Literal["euler", "heun"]] = None  # this and the next three are for the ablation sampler; null: heun
    discretization: Optional[Literal["vp", "ve", "iddpm", "edm"]] = None  # null: edm
    schedule: Optional[Literal["vp", "ve", "linear"]] = None  # null: linear
    scaling: Optional[Literal["vp", "none"]] = None  # null: none
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of the sampler, as in sample.options.order=3
    batchsize: int = number(50, above=0)  # images sampled at once, per process
    amp: Amp = "no"  # precision of the network
    tf32: bool = False  # let the network's float32 matrix products round their inputs to TF32 on GPUs; the decoder's stay float32
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


def check(config):
    """Refuse numbers outside their limits and keys that do not go together. The network and the sampler check what is theirs."""
    for name, key in KEYS.items():
        _check_limits(name, operator.attrgetter(name)(config), key.metadata)
    model, data, train, sample = config.model, config.data, config.train, config.sample
    for name, value in (("data.scale", data.scale), ("data.shift", data.shift)):
        numbers = value if isinstance(value, list) else [value or 0] * model.in_channels
        if len(numbers) != model.in_channels or not all(type(number) in (int, float) for number in numbers):
            raise UserError(f"{name}={value!r}: wanted a number, or a list of model.in_channels={model.in_channels} numbers")
    for name in (f"{section}.{key}" for section, options in (("model", model.options), ("sample", sample.options)) for key in options):
        if name in KEYS:
            raise UserError(f"{name.replace('.', '.options.')} hides a key of its own; set {name}")
    for wrong, text in (
        (train.batchsize % train.grad_accum,
         f"train.batchsize={train.batchsize} must be divisible by train.grad_accum={train.grad_accum}; "
         f"try {train.batchsize + -train.batchsize % train.grad_accum}"),
        (train.mask_ratio_min > train.mask_ratio,
         f"train.mask_ratio_min={train.mask_ratio_min} must not be above train.mask_ratio={train.mask_ratio}"),
        (train.mask_ratio > 0 and not model.use_decoder,
         f"train.mask_ratio={train.mask_ratio} needs the decoder that fills in removed patches, but model.use_decoder=false; set "
         f"train.mask_ratio=0 or model.use_decoder=true"),
        (sample.cfg_interval and sample.cfg_interval[0] >= sample.cfg_interval[1],
         f"sample.cfg_interval={sample.cfg_interval}: wanted [sigma_lo, sigma_hi] with sigma_lo below sigma_hi"),
        (config.eval.every and not config.eval.ref_path,
         f"eval.every={config.eval.every} needs eval.ref_path: the statistics or images to compare with"),
    ):
        if wrong:
            raise UserError(text)


def _check_limits(name, value, limits):
    """Hold a number, or each number of a list, against the limits of its key. NaN is outside of all limits."""
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if type(number) in (int, float) and not all(LIMITS[word](number, limit) for word, limit in limits.items()):
            wanted = [f"{word.replace('_', ' ')} {limit}" for word, limit in limits.items()]
            raise UserError(f"{name}={value} must be {' and '.join(wanted)}")


def notes(config, device, *sections):
    """What to tell the user at the start about these sections: settings that are allowed but do nothing on this device."""
    train, sample = config.train, config.sample
    candidates = [
        (train.mask_ratio_min > 0 and train.mask_ratio_fn in ("constant", "const"),
         f"train.mask_ratio_min={train.mask_ratio_min} has no effect, because train.mask_ratio_fn is constant"),
        (config.model.num_classes == 0 and sample.cfg_scale != 1,
         f"sample.cfg_scale={sample.cfg_scale} has no effect: without classes (model.num_classes=0) there is no guidance"),
        (sample.cfg_scale == 1 and sample.cfg_interval is not None,
         f"sample.cfg_interval={sample.cfg_interval} has no effect: sample.cfg_scale=1 turns guidance off"),
        (sample.tf32 and device.type != "cuda", "sample.tf32=true has no effect on a CPU: only GPUs have TF32"),
        (sample.tf32 and device.type == "cuda" and sample.amp != "no",
         f"sample.tf32=true has no effect: sample.amp={sample.amp} rounds the inputs of matrix products further"),
    ]
    return [text for holds, text in candidates if holds and text.partition(".")[0] in sections]
