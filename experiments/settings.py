"""What an experiment is: its YAML file as a checked Setting, the config of each arm, and the arithmetic of equal FLOPs."""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli import UserError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    name: str
    data: str = "latents"  # latents: of the VAE in config.vae | pixels
    seeds: list = field(default_factory=lambda: [0])
    budget_arm: str = ""  # the arm whose budget_steps steps cost what every arm may spend
    budget_steps: int = 1000
    snapshots: int = 4  # evaluations of a run, equally far apart, the last at its end
    amp: str = "auto"  # auto: bf16 where the hardware multiplies it, else no (float32) | bf16 | fp16 | no
    samples: int = 2_000  # per snapshot, and of the guided score at the end; seeds 0, 1, ...
    final_samples: int = 10_000  # of the score at the end
    guided: float = 1.5  # guidance of the second score at the end
    grid_columns: int = 4  # pictures per class that a run keeps
    config: dict = field(default_factory=dict)  # a training config, without the sections data, eval and log, and without amp
    arms: dict = field(default_factory=dict)  # name -> changes of config; title: in figures; start: [arm, share of its steps]
    costs: dict = field(default_factory=dict)  # see experiments/costs.py

    def title(self, arm):
        return self.arms[arm].get("title", arm)

    def start(self, arm):
        """(arm, share of its steps) that a tuning arm starts from, or None."""
        return self.arms[arm].get("start")


def load_setting(name, overrides=()):
    """experiments/NAME.yaml with key=value overrides as a Setting. Raises ValueError or FileNotFoundError naming what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = HERE / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--setting {name}: wanted one of {', '.join(sorted(p.stem for p in HERE.glob('*.yaml')))}")
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))))
    except OmegaConfBaseException as error:
        raise UserError(f"--set {' '.join(overrides)}: {error}") from error
    known = [option.name for option in dataclasses.fields(Setting)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{path.name}: unknown key {unknown[0]!r}; the keys are {', '.join(known[1:])}")
    setting = Setting(name, **values)
    if setting.amp == "auto":
        setting = dataclasses.replace(setting, amp=_best_amp())
    for arm in setting.arms:
        start = setting.start(arm)
        if start is not None and (start[0] not in setting.arms or setting.start(start[0]) or not 0 < start[1] < 1):
            raise UserError(f"{path.name}: arms.{arm}.start={start}; wanted an arm that starts fresh, and a share of its steps in (0, 1)")
        if start is not None and (start[1] * setting.snapshots) % 1:
            raise UserError(f"{path.name}: arms.{arm}.start={start}: that is not one of the {setting.snapshots} snapshots")
        arm_config(setting, arm, setting.seeds[0])
    if setting.budget_arm not in setting.arms:
        raise UserError(f"{path.name}: budget_arm={setting.budget_arm!r}; wanted one of {', '.join(setting.arms)}")
    return setting


def _best_amp():
    from utils import distributed
    from utils.precision import native_bf16

    return "bf16" if native_bf16(distributed.device()) else "no"


def arm_config(setting, arm, seed, **sections):
    """The checked training Config of one run; sections: more values, section by section."""
    from utils.config import from_dict

    if arm not in setting.arms:
        raise UserError(f"--arms {arm}: wanted some of {', '.join(setting.arms)}")
    changes = {key: value for key, value in setting.arms[arm].items() if key not in ("title", "start", "seeds")}
    amp = {"train": {"amp": setting.amp}, "sample": {"amp": setting.amp}}
    return from_dict(setting.config, changes, amp, {"train": {"seed": seed}}, sections)


# ---- FLOPs

@functools.lru_cache
def _counted(model):
    """[(tokens kept, FLOPs that torch counts)] for three counts."""
    from benchmarks.common import model_flops

    num_tokens = _num_tokens(model)
    kept = (num_tokens,) if not model.use_decoder else (1, num_tokens // 2, num_tokens)
    return [(k, model_flops(model, max(0.0, (num_tokens - k - 0.5) / num_tokens), training=True)) for k in kept]


def image_flops(model, num_keep):
    """Training FLOPs of one image with `num_keep` tokens in the encoder: a second-degree polynomial (attention) of the count."""
    points = _counted(model)
    return sum(flops * math.prod((num_keep - other) / (k - other) for other, _ in points if other != k) for k, flops in points)


def _num_tokens(model):
    return (model.in_size // int(model.model_type.partition("/")[2])) ** 2


def flops_per_image(config, progress=0.0):
    """Training FLOPs of one image, forward and backward, at `progress` of the run's mask-ratio schedule; counted by torch."""
    from models.masking import count_kept
    from training.schedules import mask_ratio

    return image_flops(config.model, count_kept(_num_tokens(config.model), mask_ratio(config.train, progress)))


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
