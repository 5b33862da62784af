"""Samplers and guidance. They know only model(x, sigma, class_labels) -> denoised.

Source: Karras et al. 2022 (EDM): Algorithms 1 and 2, Table 1, appendix C; Ho & Salimans 2022 (guidance).
The state is float64. The model gets x as float32 and sigma as a float32 scalar on the CPU, so that no one waits for the
GPU to read it.

A sampler of your own is a function and a line in SAMPLERS: f(model, noise, class_labels=None, *, num_steps, ..., randn_like,
progress) -> latents float64, where ... are its options, the keys of sample.options. A bad option is a UserError before the
model is called, so that a call on an empty batch checks a config.
"""

import math
from collections import namedtuple

import torch

from utils.cli import UserError


def edm_sampler(model, noise, class_labels=None, *, num_steps=40, sigma_min=0.002, sigma_max=80.0, rho=7.0,
                S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, randn_like=torch.randn_like, progress=None):
    """Algorithm 2: Heun steps of the probability flow with sigma(t) = t, optionally stochastic.

    noise: (B, C, H, W) unit normal. class_labels: handed on to the model.
    S_churn: how much noise is added and removed again, in steps with S_min <= sigma <= S_max. S_noise: factor on that noise.
    randn_like: draws it. progress: called with 1 after every step.
    Returns latents (B, C, H, W) float64. Raises UserError for options out of range.
    """
    return ablation_sampler(model, noise, class_labels, num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho,
                            S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise,
                            randn_like=randn_like, progress=progress)


@torch.no_grad()
def ablation_sampler(model, noise, class_labels=None, *, num_steps=40, sigma_min=None, sigma_max=None, rho=7.0,
                     solver="heun", discretization="edm", schedule="linear", scaling="none",
                     S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, randn_like=torch.randn_like, progress=None):
    """Any combination of the choices that EDM compares (Table 1). Arguments not listed are those of edm_sampler.

    solver: euler or heun. discretization: noise levels as in vp, ve, iddpm or edm (rho).
    schedule: sigma(t) of vp, ve or linear. scaling: s(t) of vp or none.
    sigma_min, sigma_max: None takes those of the discretization. Raises UserError for unknown choices too.
    """
    for name, value, known in (("solver", solver, ("euler", "heun")), ("discretization", discretization, DISCRETIZATIONS),
                               ("schedule", schedule, SCHEDULES), ("scaling", scaling, SCALINGS)):
        _check(value in known, f"{name}={value!r} is unknown; want one of {', '.join(known)}")
    levels, default_min, default_max = DISCRETIZATIONS[discretization]
    sigma_min = default_min if sigma_min is None else sigma_min
    sigma_max = default_max if sigma_max is None else sigma_max
    _check(num_steps >= 1, f"num_steps={num_steps} must be at least 1")
    _check(0 < sigma_min < sigma_max < math.inf,
           f"want 0 < sigma_min < sigma_max; got sigma_min={sigma_min}, sigma_max={sigma_max}")
    _check(0 < rho < math.inf, f"rho={rho} must be a number above 0")
    _check(0 <= S_churn < math.inf and 0 < S_noise < math.inf and S_min <= S_max,
           f"want S_churn >= 0, S_noise > 0 and S_min <= S_max; got {S_churn}, {S_noise}, {S_min} and {S_max}")
    sigmas = levels([i / max(num_steps - 1, 1) for i in range(num_steps)], sigma_min, sigma_max, rho)
    sigma_of, derivative_of, time_of = SCHEDULES[schedule](sigma_min, sigma_max)
    scaling_of = SCALINGS[scaling]

    def slope(x, t):
        """dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s; sigma) (EDM, eq. 81)."""
        sigma, sigma_deriv = sigma_of(t), derivative_of(t)
        s, s_deriv = scaling_of(sigma, sigma_deriv)
        denoised = model((x / s).to(torch.float32), torch.tensor(sigma, dtype=torch.float32), class_labels)
        return (sigma_deriv / sigma + s_deriv / s) * x - (sigma_deriv * s / sigma) * denoised.to(torch.float64)

    def scale(t):
        return scaling_of(sigma_of(t), derivative_of(t))[0]

    times = [time_of(sigma) for sigma in sigmas] + [0.0]
    x = noise.to(torch.float64) * (sigma_of(times[0]) * scale(times[0]))
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        if S_churn > 0:
            drawn = randn_like(x)  # drawn also outside the range, so that later draws do not depend on it
            if S_min <= sigma_of(t) <= S_max:
                sigma, t_before = sigma_of(t), t
                t = time_of(sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1)))
                added = math.sqrt(max(sigma_of(t) ** 2 - sigma**2, 0.0))
                x = scale(t) / scale(t_before) * x + added * scale(t) * S_noise * drawn
        h = t_next - t
        d = slope(x, t)
        if solver == "heun" and i < num_steps - 1:  # the last step ends at sigma = 0, where there is no slope
            d = 0.5 * d + 0.5 * slope(x + h * d, t + h)
        x = x + h * d
        if progress is not None:
            progress(1)
    return x


SAMPLERS = {"edm": edm_sampler, "ablation": ablation_sampler}


def _check(good, message):
    if not good:
        raise UserError(message)


# ---- noise levels from sigma_max (at fraction 0) down to sigma_min (at 1)

def edm_sigmas(fractions, sigma_min, sigma_max, rho):
    """Equal steps of sigma^(1/rho) (EDM, eq. 5)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + f * (last - first)) ** rho for f in fractions]


def vp_sigmas(fractions, sigma_min, sigma_max, rho):
    """Equal steps of the variance-preserving time, from 1 to EPSILON_S (Song et al. 2021)."""
    schedule = vp_through(sigma_min, sigma_max)
    return [schedule.sigma(1 + f * (EPSILON_S - 1)) for f in fractions]


def ve_sigmas(fractions, sigma_min, sigma_max, rho):
    """Equal ratios (Song et al. 2021)."""
    return [sigma_max * (sigma_min / sigma_max) ** f for f in fractions]


def iddpm_sigmas(fractions, sigma_min, sigma_max, rho):
    """Evenly chosen levels of the 1000-step cosine schedule that lie within the range (Nichol & Dhariwal 2021)."""
    # float32, as the published samples were made: ratios near 1 are rounded, which moves the smallest levels by 1e-3
    alpha_bar = (0.5 * math.pi * torch.arange(1001, dtype=torch.float32) / 1000 / (0.008 + 1)).sin() ** 2
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=0.001).tolist()
    u, levels = 0.0, []
    for ratio in reversed(ratios):
        u = math.sqrt((u**2 + 1) / ratio - 1)
        if sigma_min <= u <= sigma_max:
            levels.append(u)
    _check(levels, f"no iddpm noise level lies between sigma_min={sigma_min} and sigma_max={sigma_max}")
    levels.reverse()
    return [levels[round(f * (len(levels) - 1))] for f in fractions]


# ---- schedules sigma(t) and scalings s(t), floats in and out

EPSILON_S = 1e-3  # the smallest time of vp
Schedule = namedtuple("Schedule", "sigma derivative inverse")  # t -> sigma(t), t -> d sigma / dt, sigma -> t


def vp_schedule(beta_d, beta_min):
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    def sigma(t):
        return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def derivative(t):
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def inverse(value):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(value**2)) - beta_min) / beta_d

    return Schedule(sigma, derivative, inverse)


def vp_through(sigma_min, sigma_max):
    """The vp schedule that is sigma_min at EPSILON_S and sigma_max at 1."""
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_min / EPSILON_S - log_max) / (EPSILON_S - 1)
    return vp_schedule(beta_d, log_max - 0.5 * beta_d)


def vp_scaling(sigma, derivative):
    """s and ds/dt of 1 / sqrt(1 + sigma^2)."""
    s = 1 / math.sqrt(1 + sigma**2)
    return s, -sigma * derivative * s**3


SCHEDULES = {  # functions of sigma_min and sigma_max
    "vp": vp_through,
    "ve": lambda *_: Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda value: value**2),
    "linear": lambda *_: Schedule(lambda t: t, lambda t: 1.0, lambda value: value),
}
SCALINGS = {"vp": vp_scaling, "none": lambda sigma, derivative: (1.0, 0.0)}
# Noise levels, and sigma_min and sigma_max of the original methods (EDM, Table 1 and appendix C). The vp range belongs to
# beta_d = 19.1, not to the 19.9 of the VP paper: the published samples were made so.
DISCRETIZATIONS = {
    "vp": (vp_sigmas, *map(vp_schedule(19.1, 0.1).sigma, (EPSILON_S, 1.0))),
    "ve": (ve_sigmas, 0.02, 100.0),
    "iddpm": (iddpm_sigmas, 0.002, 81.0),
    "edm": (edm_sigmas, 0.002, 80.0),
}


# ---- guidance

def guided(net, cfg_scale, interval=None):
    """Classifier-free guidance: a model for the samplers with D = D_uncond + cfg_scale * (D_cond - D_uncond).

    net: EDMPrecond. cfg_scale: 1 or None is off (the net itself comes back).
    interval: guide only for sigma in (lo, hi] (Kynkaanniemi et al. 2024), conditional elsewhere;
    it needs one sigma for the whole batch, as the samplers give.
    Raises UserError for an unconditional net; the model raises ValueError without class labels.
    """
    if cfg_scale is None or cfg_scale == 1:
        return net
    _check(net.num_classes, f"cfg_scale={cfg_scale} needs a class-conditional model; this one has num_classes=0: use 1")

    def model(x, sigma, class_labels=None):
        if class_labels is None:
            raise ValueError(f"cfg_scale={cfg_scale} needs class_labels; pass them, or use cfg_scale 1")
        if interval is not None and not interval[0] < float(sigma) <= interval[1]:
            return net(x, sigma, class_labels)
        if torch.is_tensor(sigma) and sigma.numel() > 1:
            sigma = sigma.repeat(2)
        labels = torch.cat([class_labels, torch.full_like(class_labels, net.num_classes)])
        conditional, unconditional = net(x.repeat(2, 1, 1, 1), sigma, labels).chunk(2)  # one batch of 2B
        return unconditional + cfg_scale * (conditional - unconditional)

    return model
