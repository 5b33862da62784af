"""Learning rate and mask ratio as pure functions of progress, so that a resumed run needs no schedule state."""

import math


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

    constant stays at mask_ratio; linear falls evenly; exp falls as exp(-7 t); cosineN as cos^N(pi t / 2).
    Source: the MaskDiT paper (unmasking tuning: constant 0, or cosine4 from 0.5 to 0).
    """
    name = config.mask_ratio_fn.replace("cosine", "cos")
    if name in ("constant", "const"):
        return config.mask_ratio
    if name == "linear":
        share = 1.0 - progress
    elif name == "exp":
        share = math.exp(-7.0 * progress)
    else:
        share = math.cos(math.pi * progress / 2) ** int(name.removeprefix("cos"))
    return config.mask_ratio_min + (config.mask_ratio - config.mask_ratio_min) * share
