"""Samplers and guidance. They know only model(x, sigma, class_labels) -> denoised.

Source: Karras et al. 2022 (EDM): Algorithms 1 and 2, Table 1, appendix C; Ho & Salimans 2022 (guidance).
The state is float64; the model gets x as float32 and sigma as a float32 scalar on the CPU, which nothing
on a GPU has to wait for.
"""

import functools
import math
from typing import Callable, NamedTuple

import torch

from utils.cli import UserError

SOLVERS = ("euler", "heun")


class Churn(NamedTuple):
    """Noise added before each step with S_min <= sigma <= S_max, as in Algorithm 2."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


def edm_sampler(model, noise, class_labels=None, *, num_steps=40, sigma_min=0.002, sigma_max=80.0, rho=7.0,
                S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, randn_like=torch.randn_like, progress=None):
    """Algorithm 2: Heun steps of the probability flow with sigma(t) = t, optionally stochastic.

    noise: (B, C, H, W) unit normal. class_labels: handed on to the model. randn_like: draws the noise of S_churn.
    progress: called with 1 after every step. Returns latents (B, C, H, W) float64.
    """
    _check_range(sigma_min, sigma_max)
    sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho)
    return _integrate(model, noise, class_labels, sigmas, linear_schedule(), no_scaling, "heun", 1.0,
                      Churn(S_churn, S_min, S_max, S_noise), randn_like, progress)


def ablation_sampler(model, noise, class_labels=None, *, num_steps=40, sigma_min=None, sigma_max=None, rho=7.0,
                     solver="heun", discretization="edm", schedule="linear", scaling="none",
                     epsilon_s=1e-3, C_1=0.001, C_2=0.008, M=1000, alpha=1.0,
                     S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, randn_like=torch.randn_like, progress=None):
    """Any combination of the choices that EDM compares (Table 1); arguments not listed are those of edm_sampler.

    solver: euler or heun (alpha: place of its second evaluation, 1 = end of the step).
    discretization: noise levels as in vp (epsilon_s), ve, iddpm (C_1, C_2, M) or edm (rho).
    schedule: sigma(t) of vp, ve or linear. scaling: s(t) of vp or none.
    sigma_min, sigma_max: None takes those of the discretization. Raises ValueError for an unknown choice or range.
    """
    _check_choice("solver", solver, SOLVERS)
    _check_choice("discretization", discretization, DEFAULT_SIGMAS)
    _check_choice("schedule", schedule, SCHEDULES)
    _check_choice("scaling", scaling, SCALINGS)
    default_min, default_max = DEFAULT_SIGMAS[discretization](epsilon_s)
    sigma_min = default_min if sigma_min is None else sigma_min
    sigma_max = default_max if sigma_max is None else sigma_max
    _check_range(sigma_min, sigma_max)
    if not 0 < alpha <= 1:
        raise UserError(f"alpha={alpha} must be above 0 and at most 1")
    sigmas = {
        "vp": lambda: vp_sigmas(num_steps, sigma_min, sigma_max, epsilon_s),
        "ve": lambda: ve_sigmas(num_steps, sigma_min, sigma_max),
        "iddpm": lambda: iddpm_sigmas(num_steps, sigma_min, sigma_max, C_1, C_2, M),
        "edm": lambda: edm_sigmas(num_steps, sigma_min, sigma_max, rho),
    }[discretization]()
    return _integrate(model, noise, class_labels, sigmas, SCHEDULES[schedule](sigma_min, sigma_max, epsilon_s),
                      SCALINGS[scaling], solver, alpha, Churn(S_churn, S_min, S_max, S_noise), randn_like, progress)


# ---- noise levels: num_steps values from sigma_max down to sigma_min

def edm_sigmas(num_steps, sigma_min, sigma_max, rho):
    """Equal steps of sigma^(1/rho) (EDM, eq. 5)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + f * (last - first)) ** rho for f in _fractions(num_steps)]


def vp_sigmas(num_steps, sigma_min, sigma_max, epsilon_s):
    """Equal steps of the variance-preserving time, from 1 to epsilon_s (Song et al. 2021)."""
    sigma, _, _ = vp_schedule(sigma_min, sigma_max, epsilon_s)
    return [sigma(1 + f * (epsilon_s - 1)) for f in _fractions(num_steps)]


def ve_sigmas(num_steps, sigma_min, sigma_max):
    """Equal ratios (Song et al. 2021)."""
    return [sigma_max * (sigma_min / sigma_max) ** f for f in _fractions(num_steps)]


def iddpm_sigmas(num_steps, sigma_min, sigma_max, C_1, C_2, M):
    """Evenly chosen levels of the M-step cosine schedule that lie within the range (Nichol & Dhariwal 2021)."""
    # float32, as the published samples were made: ratios near 1 round, which moves the smallest levels by 1e-3
    alpha_bar = (0.5 * math.pi * torch.arange(M + 1, dtype=torch.float32) / M / (C_2 + 1)).sin() ** 2
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1).tolist()
    u, levels = 0.0, []
    for ratio in reversed(ratios):
        u = math.sqrt((u**2 + 1) / ratio - 1)
        if sigma_min <= u <= sigma_max:
            levels.append(u)
    if not levels:
        raise UserError(f"no iddpm noise level lies between sigma_min={sigma_min} and sigma_max={sigma_max}")
    levels.reverse()
    return [levels[round(f * (len(levels) - 1))] for f in _fractions(num_steps)]


def _fractions(num_steps):
    """0, ..., 1 in num_steps values."""
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps} must be at least 1")
    return [i / max(num_steps - 1, 1) for i in range(num_steps)]


# ---- schedules sigma(t) and scalings s(t), floats in and out

class Schedule(NamedTuple):
    sigma: Callable       # t -> sigma(t)
    derivative: Callable  # t -> d sigma / dt
    inverse: Callable     # sigma -> t


def vp_schedule(sigma_min, sigma_max, epsilon_s):
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1) through sigma_min at epsilon_s and sigma_max at 1."""
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_min / epsilon_s - log_max) / (epsilon_s - 1)
    beta_min = log_max - 0.5 * beta_d

    def sigma(t):
        return _vp_sigma(t, beta_d, beta_min)

    def derivative(t):
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def inverse(value):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(value**2)) - beta_min) / beta_d

    return Schedule(sigma, derivative, inverse)


def _vp_sigma(t, beta_d, beta_min):
    return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))


def ve_schedule(*_):
    return Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda value: value**2)


def linear_schedule(*_):
    return Schedule(lambda t: t, lambda t: 1.0, lambda value: value)


def vp_scaling(sigma, derivative):
    """s and ds/dt of 1 / sqrt(1 + sigma^2)."""
    s = 1 / math.sqrt(1 + sigma**2)
    return s, -sigma * derivative * s**3


def no_scaling(sigma, derivative):
    return 1.0, 0.0


SCHEDULES = {"vp": vp_schedule, "ve": ve_schedule, "linear": linear_schedule}
SCALINGS = {"vp": vp_scaling, "none": no_scaling}
# (sigma_min, sigma_max) of the original methods, as functions of epsilon_s (EDM, Table 1 and appendix C). The vp range
# belongs to beta_d = 19.1, not to the 19.9 of the VP paper: the published samples were made so.
DEFAULT_SIGMAS = {
    "vp": lambda epsilon_s: (_vp_sigma(epsilon_s, 19.1, 0.1), _vp_sigma(1.0, 19.1, 0.1)),
    "ve": lambda epsilon_s: (0.02, 100.0),
    "iddpm": lambda epsilon_s: (0.002, 81.0),
    "edm": lambda epsilon_s: (0.002, 80.0),
}


def _check_choice(name, value, known):
    if value not in known:
        raise UserError(f"{name}={value!r} is unknown; want one of {', '.join(known)}")


def _check_range(sigma_min, sigma_max):
    if not 0 < sigma_min < sigma_max:
        raise UserError(f"want 0 < sigma_min < sigma_max; got sigma_min={sigma_min}, sigma_max={sigma_max}")


# ---- integration

@torch.no_grad()
def _integrate(model, noise, class_labels, sigmas, schedule, scaling, solver, alpha, churn, randn_like, progress):
    """Solve dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s; sigma) from sigma_max to 0 (EDM, eq. 81)."""
    def scale(t):
        return scaling(schedule.sigma(t), schedule.derivative(t))[0]

    def slope(x, t):
        sigma, sigma_deriv = schedule.sigma(t), schedule.derivative(t)
        s, s_deriv = scaling(sigma, sigma_deriv)
        denoised = model((x / s).to(torch.float32), torch.tensor(sigma, dtype=torch.float32), class_labels)
        return (sigma_deriv / sigma + s_deriv / s) * x - (sigma_deriv * s / sigma) * denoised.to(torch.float64)

    num_steps = len(sigmas)
    times = [schedule.inverse(sigma) for sigma in sigmas] + [0.0]
    x = noise.to(torch.float64) * (schedule.sigma(times[0]) * scale(times[0]))
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        if churn.S_churn > 0:
            x, t = _add_churn(x, t, schedule, scale, churn, num_steps, randn_like)
        h = t_next - t
        d = slope(x, t)
        if solver == "heun" and i < num_steps - 1:  # the last step ends at sigma = 0, where there is no slope
            d_second = slope(x + alpha * h * d, t + alpha * h)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_second
        x = x + h * d
        if progress is not None:
            progress(1)
    return x


def _add_churn(x, t, schedule, scale, churn, num_steps, randn_like):
    """Raise the noise level of x at time t: returns the noisier x and its time."""
    noise = randn_like(x)  # drawn also outside the range, so that later draws do not depend on it
    sigma = schedule.sigma(t)
    if not churn.S_min <= sigma <= churn.S_max:
        return x, t
    gamma = min(churn.S_churn / num_steps, math.sqrt(2) - 1)
    t_hat = schedule.inverse(sigma * (1 + gamma))
    added = math.sqrt(max(schedule.sigma(t_hat) ** 2 - sigma**2, 0.0))
    return scale(t_hat) / scale(t) * x + added * scale(t_hat) * churn.S_noise * noise, t_hat


# ---- the network as samplers call it

class SharedConditioning:
    """An EDMPrecond for samplers, model(x, sigma, class_labels), that computes nothing twice of what x has no part in.

    Embeddings and adaLN are computed once per distinct sigma (Heun asks for most of them twice) and once per distinct class:
    the unconditional rows of guidance are one row. Equal to the network itself up to the order of float32 sums.
    Labels count as new when they are another tensor, so that a GPU need not be waited for.
    """

    def __init__(self, net):
        self.net, self.num_classes = net, net.num_classes
        self.labels, self.distinct, self.rows = None, None, None
        self.sigma, self.modulations = None, None

    def __call__(self, x, sigma, class_labels=None):
        if class_labels is not self.labels:
            self.labels, self.sigma = class_labels, None
            if class_labels is not None:
                self.distinct, self.rows = class_labels.unique(return_inverse=True)
        if self.sigma != float(sigma):
            self.sigma, self.modulations = float(sigma), self._modulate(sigma)
        return self.net(x, sigma, class_labels, modulations=self.modulations)

    def _modulate(self, sigma):
        if self.labels is None:
            return self.net.modulations(sigma)
        return {layer: rows[self.rows] for layer, rows in self.net.modulations(sigma, self.distinct).items()}


# ---- guidance

def guided(net, cfg_scale, interval=None):
    """Classifier-free guidance: a model for the samplers with D = D_uncond + cfg_scale * (D_cond - D_uncond).

    net: EDMPrecond, or SharedConditioning of one. cfg_scale: 1 or None is off (the net itself comes back).
    interval: (sigma_lo, sigma_hi]: guide only there (Kynkaanniemi et al. 2024), conditional elsewhere;
    it needs one sigma for the whole batch, as the samplers give.
    Raises ValueError for an unconditional net; when called, for missing class labels.
    """
    if cfg_scale is None or cfg_scale == 1:
        return net
    if not net.num_classes:
        raise UserError(f"cfg_scale={cfg_scale} needs a class-conditional model; this one has num_classes=0: use 1")
    sigma_lo, sigma_hi = (0.0, math.inf) if interval is None else interval

    @functools.lru_cache(maxsize=1)  # tensors are compared by identity: samplers hand in the same one at every step
    def with_unconditional(class_labels):
        return torch.cat([class_labels, torch.full_like(class_labels, net.num_classes)])

    def model(x, sigma, class_labels=None):
        if class_labels is None:
            raise UserError(f"cfg_scale={cfg_scale} needs class_labels; pass them, or use cfg_scale 1")
        if interval is not None and not sigma_lo < float(sigma) <= sigma_hi:
            return net(x, sigma, class_labels)
        if torch.is_tensor(sigma) and sigma.numel() > 1:
            sigma = sigma.repeat(2)
        denoised = net(x.repeat(2, 1, 1, 1), sigma, with_unconditional(class_labels))  # one batch of 2B
        conditional, unconditional = denoised.chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)

    return model
