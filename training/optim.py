"""The optimizer, its steps in any precision, and the two schedules: learning rate and mask ratio."""

import math

import torch

from sampling.load import strip_prefixes
from utils.cli import UserError
from utils.precision import effective_amp

STEADIER = "Try a lower train.lr, train.grad_clip=1, or train.amp=bf16 (or no)"


def make_optimizer(net, train):
    """The optimizer of a TrainConfig for the weights of `net` that are trained."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)


def learning_rate(config, images_seen, progress):
    """Learning rate of the step that starts after `images_seen` images of this run.

    config: TrainConfig. progress: steps of this run done / steps of this run, in [0, 1].
    Linear warm-up over warmup_images, times the schedule: constant, or down to 0 at progress 1 (cosine, linear).
    """
    warmup = min(1.0, images_seen / config.warmup_images) if config.warmup_images else 1.0
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.lr * warmup * decay[config.lr_schedule]


def mask_ratio(config, progress):
    """Share of patches to remove at `progress` in [0, 1] of the run, from mask_ratio down to mask_ratio_min.

    Source: the MaskDiT paper (unmasking tuning: constant 0, or cosine4 from 0.5 to 0).
    """
    name = config.mask_ratio_fn
    if name in ("constant", "const"):
        return config.mask_ratio
    shares = {"linear": 1.0 - progress, "exp": math.exp(-7.0 * progress)}
    share = shares[name] if name in shares else math.cos(math.pi * progress / 2) ** int(name[-1])
    return config.mask_ratio_min + (config.mask_ratio - config.mask_ratio_min) * share


class Stepper:
    """One optimizer step in any precision: loss scaling, clipping, and skipping steps with NaN or Inf losses or gradients.

    Nothing here waits for the GPU, unless the optimizer is not fused: fused ones read on the device whether to skip.
    bad_steps: (2,) int64 on the device, steps skipped [in a row until now, in all]. After more than max_bad_steps in a row every
    step is skipped, so that `report`, which looks only now and then, still finds where it began.
    """

    def __init__(self, optimizer, amp, device, grad_clip=0.0, max_bad_steps=20):
        self.optimizer, self.grad_clip, self.max_bad_steps = optimizer, grad_clip, max_bad_steps
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=effective_amp(amp, device) == "fp16")
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)
        self.reported = 0  # bad steps that the user has heard of

    def backward(self, loss):
        """Add the gradients of the scaled loss (a scalar)."""
        # An infinite loss can have finite gradients. NaN gradients make all processes skip, once they are averaged.
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self.scaler.scale(loss * sound).backward()

    def step(self):
        """Unscale, clip, update unless the step is bad, clear the gradients. Returns the norm before clipping, NaN if skipped."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        in_a_row, total = self.bad_steps
        bad = ~torch.isfinite(norm) | (in_a_row > self.max_bad_steps)
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm, foreach=True)
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = bad.float()  # how GradScaler tells a fused optimizer to skip; here also without a scaler
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = torch.stack([(in_a_row + 1) * bad, total + bad])
        return torch.where(bad, torch.nan, norm)

    def report(self, step):
        """A warning if there were bad steps since the last call, else "". Raises UserError if the run is past hope by `step`."""
        in_a_row, total = self.bad_steps.tolist()
        new, self.reported = total - self.reported, total
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        if in_a_row > self.max_bad_steps:
            first = step - in_a_row + 1
            raise UserError(f"steps {first} to {first + self.max_bad_steps} all had NaN or Inf losses or gradients{scale}. {STEADIER}")
        if self.scaler.get_scale() < 1:  # gradients vanish below it, instead of overflowing; it is 1 without a scaler
            raise UserError(f"fp16's loss scale has fallen below 1 by step {step}, after {total} skipped steps. {STEADIER}")
        return f"{new} steps up to step {step} had NaN or Inf losses or gradients and were skipped ({total} in all{scale})" if new else ""

    def state_dict(self):
        return {"scaler": self.scaler.state_dict(), "bad_steps": self.bad_steps.tolist()}

    def load_state_dict(self, state):
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = torch.tensor(state["bad_steps"], device=self.bad_steps.device)
        self.reported = state["bad_steps"][1]


def load_optimizer_state(optimizer, saved):
    """Take the moments from a state dict of the same optimizer; its settings stay those of the config."""
    optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
    for moments in optimizer.state.values():
        for name, value in moments.items():
            moments[name] = value.clone()  # on a CPU it was still the file's


def load_moments_by_name(optimizer, net, checkpoint, path):
    """Take AdamW's moments from a checkpoint, ours or a published one, by the names of its weights.

    An optimizer numbers parameters in the order of the state dict; the published one counts the fixed positions too.
    """
    saved = checkpoint["opt"]
    names = [strip_prefixes(name) for name in checkpoint["model"]]
    count = len(saved["param_groups"][0]["params"])
    if count != len(names):
        names = [name for name in names if not name.endswith("pos_embed")]
    by_name = {names[i]: moments for i, moments in saved["state"].items()} if count == len(names) else {}
    own = optimizer.state_dict()
    for i, (name, parameter) in enumerate((name, p) for name, p in net.named_parameters() if p.requires_grad):
        if name not in by_name or by_name[name]["exp_avg"].shape != parameter.shape:
            raise UserError(f"checkpoint {path}: its optimizer state has nothing that fits {name} {tuple(parameter.shape)}; "
                            f"to start from its weights only, add --use_strict_load False")
        own["state"][i] = by_name[name]
    load_optimizer_state(optimizer, own)
