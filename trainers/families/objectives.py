"""How to corrupt clean latents and what to regress. Pure tensor maths that knows no model.

Shapes: x0 and eps (B, C, h, w), clean latents and unit Gaussian noise; t (B,), on x0's device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from trainers.config import ObjectiveConfig
from trainers.data.rng import SampleRng
from trainers.data.transfer import send
from trainers.errors import UserError
from trainers.families.objective import Objective


@dataclass(frozen=True)
class DDPM(Objective):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4), with t an integer in
    [0, T).

    The network regresses eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (Salimans and Ho 2022).

    Weights of the squared error, with s = abar / (1 - abar), the signal-to-noise ratio:
    min-SNR (Hang et al. 2023): min(s, gamma) / s for eps, min(s, gamma) / (s + 1) for v;
    debiased (Yu et al. 2023): 1 / sqrt(s) for eps, which for v is sqrt(s) / (s + 1).
    """

    abar: Tensor = field(repr=False)  # (T,) float32, the cumulative product of the alphas
    prediction_type: str = "epsilon"  # or "v_prediction"
    snr_gamma: float | None = None
    debiased: bool = False
    noise_offset: float = 0.0
    multires_noise_levels: int = 0
    multires_noise_discount: float = 0.3

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base model predicts {self.prediction_type!r}: only epsilon and v_prediction "
                f"train"
            )

    @classmethod
    def from_scheduler(
        cls, scheduler: SchedulerMixin, config: ObjectiveConfig, device: torch.device
    ) -> DDPM:
        """With the noise levels of a base's own scheduler, and what it says that the base predicts.

        Raises: UserError for a scheduler of another kind.
        """
        if "beta_schedule" not in scheduler.config:
            raise UserError(
                f"the base's scheduler is {type(scheduler).__name__}, which has no betas: a base "
                "that was trained with other noise levels (EDM) cannot be trained here"
            )
        options = {f.name for f in fields(cls)} - {"abar", "prediction_type"}
        return cls(
            abar=send(scheduler.alphas_cumprod, device),
            # epsilon for the releases; some fine-tuned models predict v
            prediction_type=scheduler.config.prediction_type,
            **config.model_dump(include=options),
        )

    def times(self, rng: SampleRng) -> Tensor:
        low, high = self.t_range
        share = low + (high - low) * rng.uniform(self.stratified)
        return (share * len(self.abar)).long()

    def noise(self, x0: Tensor, rng: SampleRng) -> Tensor:
        eps = rng.normal(x0.shape)
        if levels := self.multires_noise_levels:
            eps = pyramid_noise(eps, levels, self.multires_noise_discount, rng)
        if self.noise_offset:
            eps = eps + self.noise_offset * rng.normal((*x0.shape[:2], 1, 1))
        return eps

    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self.signal_and_noise(t)
        return signal * eps - noise * x0

    def weight(self, t: Tensor) -> Tensor:
        """(B,). With zero terminal SNR the eps weight is 0 / 0 at the last time; its limit is
        taken, s -> 0."""
        if self.snr_gamma is None and not self.debiased:
            return torch.ones(t.shape, device=t.device)
        abar = self.abar.to(t.device)[t]
        snr = abar / (1 - abar).clamp(min=1e-8)
        scale = snr.clamp(min=1e-8) if self.prediction_type == "epsilon" else snr + 1
        if self.snr_gamma is not None:
            return snr.clamp(min=1e-8, max=self.snr_gamma) / scale
        return snr.clamp(min=1e-3).sqrt() / scale.clamp(min=1e-3)

    def noise_share(self, t: Tensor) -> Tensor:
        return t / len(self.abar)

    def noise_to_signal(self, t: Tensor) -> Tensor:
        abar = self.abar.to(t.device)[t]
        return ((1 - abar) / abar).sqrt()

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, 1) each: sqrt(abar_t) and sqrt(1 - abar_t)."""
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()


@dataclass(frozen=True)
class RectifiedFlow(Objective):
    """x_t = (1 - t) x0 + t eps with t in (0, 1), and v = eps - x0 to regress (Liu et al. 2023;
    Lipman et al. 2023).

    Densities of t before the shift (Esser et al. 2024, section 3.1): uniform; logit_normal, t =
    sigmoid(m + s n); mode, t = 1 - u - s (cos^2(pi u / 2) - 1 + u); cosmap, t = 1 - 1 / (tan(pi u /
    2) + 1). t = 1 is noise, as in the paper: a
    `logit_mean` brought from the diffusers scripts changes its sign.

    Shift: t -> a t / (1 + (a - 1) t), which keeps the signal-to-noise ratio of pictures with a^2
    times the pixels (section 5.3.2).

    Weights: sigma_sqrt 1 / t^2; cosmap 2 / (pi (1 - 2 t + 2 t^2)). Preconditioned, the network's
    output is read as an estimate of x0, x_t - t v: that is the loss of v times t^2.
    """

    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    precondition: bool = False

    def times(self, rng: SampleRng) -> Tensor:
        first, last = self.u_range
        return self.time_of(first + (last - first) * rng.uniform(self.stratified))

    def time_of(self, u: Tensor) -> Tensor:
        """The time below which a share u (B,) of the times is drawn, or above which in mode."""
        match self.density:
            case "uniform":
                t = u
            case "logit_normal":
                t = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
            case "mode":
                t = 1 - u - self.mode_scale * (torch.cos(torch.pi / 2 * u).square() - 1 + u)
            case "cosmap":
                t = 1 - 1 / (torch.tan(torch.pi / 2 * u) + 1)
        return (self.shift * t / (1 + (self.shift - 1) * t)).clamp(1e-4, 1 - 1e-6)

    @cached_property
    def u_range(self) -> tuple[float, float]:
        """Between which shares the times are those of `t_range`, in the same proportions."""
        low, high = sorted(map(self.share_of, self.t_range))
        return low, high

    def share_of(self, t: float) -> float:
        """The u whose time is t, found by halving."""
        if t in (0.0, 1.0):
            return 1 - t if self.density == "mode" else t
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            is_below = self.time_of(torch.tensor(middle)).item() < t
            low, high = (middle, high) if is_below != (self.density == "mode") else (low, middle)
        return (low + high) / 2

    def noise(self, x0: Tensor, rng: SampleRng) -> Tensor:
        return rng.normal(x0.shape)

    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def weight(self, t: Tensor) -> Tensor:
        """(B,)"""
        scale = t.square() if self.precondition else torch.ones_like(t)
        match self.weighting:
            case "sigma_sqrt":
                return scale / t.square()
            case "cosmap":
                return scale * 2 / (torch.pi * (1 - 2 * t + 2 * t.square()))
        return scale

    def noise_share(self, t: Tensor) -> Tensor:
        return t

    def noise_to_signal(self, t: Tensor) -> Tensor:
        return t / (1 - t)


def pyramid_noise(eps: Tensor, levels: int, discount: float, rng: SampleRng) -> Tensor:
    """Noise (B, C, h, w) of unit variance in each sample that is alike over larger areas too.

    Of `levels`, each has half the height and width of the last and `discount` times its weight
    (multi-resolution noise, Whitaker 2023, with fixed instead of random sizes).
    """
    height, width = eps.shape[-2:]
    for level in range(1, levels + 1):
        size = (max(height >> level, 1), max(width >> level, 1))
        coarse = F.interpolate(
            rng.normal((*eps.shape[:2], *size)), (height, width), mode="bilinear"
        )
        eps = eps + discount**level * coarse
        if 1 in size:
            break
    return eps / eps.std((1, 2, 3), correction=0, keepdim=True)


def resolution_shift(scheduler: dict, tokens: int) -> float:
    """The factor by which a model's own scheduler shifts a picture of `tokens` tokens: Flux.1's
    grows with them."""
    if not scheduler.get("use_dynamic_shifting"):
        return scheduler["shift"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (
        scheduler["max_image_seq_len"] - scheduler["base_image_seq_len"]
    )
    return math.exp(scheduler["base_shift"] + slope * (tokens - scheduler["base_image_seq_len"]))
