"""What an experiment is: its YAML file as a checked Setting, the config of each arm, and the arithmetic of equal FLOPs."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.cli import UserError

HERE = Path(__file__).resolve().parent
CHOICES = {"data": ("latents", "pixels"), "amp": ("auto", "bf16", "fp16", "no")}
AT_LEAST_ONE = ("budget_steps", "snapshots", "samples", "final_samples", "grid_columns")
ARM_KEYS = ("title", "start", "seeds")  # of an arm; its other keys change the config
COST_KEYS = ("sides", "widths", "tokens_per_step")


@dataclass(frozen=True)
class Setting:
    name: str = ""
    data: str = "latents"  # latents: of the VAE in config.vae | pixels
    seeds: list[int] = field(default_factory=lambda: [0])
    budget_arm: str = ""  # the arm whose budget_steps steps cost what every arm may spend
    budget_steps: int = 1000
    snapshots: int = 4  # evaluations of a run, equally far apart, the last at its end
    amp: Any = "auto"  # auto: bf16 where the hardware multiplies it, else no (float32) | bf16 | fp16 | no
    samples: int = 2_000  # per snapshot, and of the guided score at the end; seeds 0, 1, ...
    final_samples: int = 10_000  # of the score at the end
    guided: float = 1.5  # guidance of the second score at the end
    grid_columns: int = 4  # pictures per class that a run keeps
    config: dict[str, Any] = field(default_factory=dict)  # a training config, without the sections data, eval and log, and without amp
    arms: dict[str, Any] = field(default_factory=dict)  # name -> changes of config; title: in figures; start: [arm, share of its steps]
    costs: dict[str, Any] = field(default_factory=dict)  # see experiments/costs.py

    def title(self, arm):
        return self.arms[arm].get("title", arm)

    def start(self, arm):
        """(arm, share of its steps) that a tuning arm starts from, or None."""
        return self.arms[arm].get("start")


def load_setting(name, overrides=()):
    """experiments/NAME.yaml with key=value overrides as a Setting, all of it checked. Raises UserError naming what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = HERE / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--setting {name}: wanted one of {', '.join(sorted(p.stem for p in HERE.glob('*.yaml')))}")
    where = f"{path.name}{' with --set ' if overrides else ''}{' '.join(overrides)}"
    try:
        layers = OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)), {"name": name}
        merged = OmegaConf.merge(OmegaConf.structured(Setting), *layers)
        setting = Setting(**OmegaConf.to_container(merged))
        setting = dataclasses.replace(setting, amp="no") if setting.amp is False else setting  # YAML reads an unquoted `no` as false
    except (OmegaConfBaseException, ValueError) as error:
        keys = ", ".join(option.name for option in dataclasses.fields(Setting) if option.name != "name")
        raise UserError(f"{where}: {str(error).splitlines()[0]}; the keys are {keys}") from error
    _check(setting, where)
    return dataclasses.replace(setting, amp=_best_amp()) if setting.amp == "auto" else setting


def _check(setting, where):
    """Raise UserError if a value is out of range, or an arm cannot be trained as it says."""
    def check(right, key, wanted):
        if not right:
            raise UserError(f"{where}: {key}; wanted {wanted}")

    for key, choices in CHOICES.items():
        check(getattr(setting, key) in choices, f"{key}={getattr(setting, key)!r}", f"one of {', '.join(choices)}")
    for key in AT_LEAST_ONE:
        check(getattr(setting, key) >= 1, f"{key}={getattr(setting, key)}", "1 or more")
    check(setting.seeds and min(setting.seeds) >= 0, f"seeds={setting.seeds}", "one or more numbers of 0 or more")
    check(setting.budget_arm in setting.arms, f"budget_arm={setting.budget_arm!r}", f"one of {', '.join(setting.arms)}")
    check(set(setting.costs) <= set(COST_KEYS), f"costs={setting.costs}", f"the keys {', '.join(COST_KEYS)}")
    for arm, changes in setting.arms.items():
        check(isinstance(changes, dict), f"arms.{arm}={changes!r}", "keys and values")
        seeds, start = changes.get("seeds", [0]), changes.get("start")
        right = isinstance(seeds, list) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
        check(right, f"arms.{arm}.seeds={seeds}", "a list of numbers")
        arm_config(setting, arm, setting.seeds[0])
        if start is not None:
            fits = isinstance(start, list) and len(start) == 2 and start[0] in setting.arms and not setting.start(start[0])
            check(fits and isinstance(start[1], float) and 0 < start[1] < 1, f"arms.{arm}.start={start}",
                  "an arm that starts fresh, and a share of its steps in (0, 1)")
            check((start[1] * setting.snapshots) % 1 == 0, f"arms.{arm}.start={start}",
                  f"a share that is one of the {setting.snapshots} snapshots")


def _best_amp():
    from utils import distributed
    from utils.precision import native_bf16

    return "bf16" if native_bf16(distributed.device()) else "no"


def arm_config(setting, arm, seed, **sections):
    """The checked training Config of one run; sections: more values, section by section."""
    from utils.config import from_dict

    changes = {key: value for key, value in setting.arms[arm].items() if key not in ARM_KEYS}
    amp = {} if setting.amp == "auto" else {"train": {"amp": setting.amp}, "sample": {"amp": setting.amp}}
    return from_dict(setting.config, changes, amp, {"train": {"seed": seed}}, sections)


# ---- FLOPs

_counted = {}  # of each network: [(tokens kept, FLOPs that torch counts)] for three counts


def image_flops(config, num_keep):
    """Training FLOPs of one image with `num_keep` tokens in the encoder: a second-degree polynomial (attention) of the count."""
    from benchmarks.work import model_flops

    tokens, key = _num_tokens(config.model), repr(config.model)
    if key not in _counted:
        kept = (1, tokens // 2, tokens) if config.model.use_decoder else (tokens,)
        _counted[key] = [(k, model_flops(config, max(0.0, (tokens - k - 0.5) / tokens), training=True)) for k in kept]
    points = _counted[key]
    return sum(flops * math.prod((num_keep - other) / (k - other) for other, _ in points if other != k) for k, flops in points)


def _num_tokens(model):
    return (model.in_size // int(model.model_type.partition("/")[2])) ** 2


def flops_per_image(config, progress=0.0):
    """Training FLOPs of one image, forward and backward, at `progress` of the run's mask-ratio schedule; counted by torch."""
    from models.masking import count_kept
    from training.optim import mask_ratio

    return image_flops(config, count_kept(_num_tokens(config.model), mask_ratio(config.train, progress)))


def flops_of_steps(config, steps, of):
    """FLOPs of the first `steps` of a run of `of` steps."""
    return config.train.batchsize * sum(flops_per_image(config, step / of) for step in range(steps))


def plan(setting, arm):
    """Steps of an arm, a multiple of its snapshots, so that it spends the budget: {"steps", "num_snapshots", "start_step", "start_flops"}.

    A tuning arm spends what its trunk had left, in as many snapshots as the trunk has left.
    """
    reference = arm_config(setting, setting.budget_arm, 0)
    budget = flops_of_steps(reference, setting.budget_steps, setting.budget_steps)
    config, snapshots, start_step, start_flops = arm_config(setting, arm, 0), setting.snapshots, 0, 0
    if setting.start(arm):
        trunk, share = setting.start(arm)
        whole = plan(setting, trunk)
        snapshots = round((1 - share) * setting.snapshots)
        start_step = round(share * whole["steps"])
        start_flops = flops_of_steps(arm_config(setting, trunk, 0), start_step, whole["steps"])
    mean = flops_of_steps(config, 1000, 1000) / 1000
    steps = max(1, round((budget - start_flops) / mean / snapshots)) * snapshots
    return {"steps": steps, "num_snapshots": snapshots, "start_step": start_step, "start_flops": start_flops}
