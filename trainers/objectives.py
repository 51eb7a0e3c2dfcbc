"""How to corrupt clean latents and what to regress. Pure tensor maths that knows no model.

Shapes: x0 and eps (B, C, h, w), clean latents and unit Gaussian noise; t (B,), on x0's device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from . import UserError
from .draws import Draws


class Objective(Protocol):
    def times(self, rng: Draws) -> Tensor: ...
    def noise(self, x0: Tensor, rng: Draws) -> Tensor: ...
    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DDPM:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4), with t an integer in [0, T).

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
    stratified: bool = True

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base model predicts {self.prediction_type!r}: only epsilon and v_prediction can train"
            )

    def times(self, rng: Draws) -> Tensor:
        return (rng.uniform(self.stratified) * len(self.abar)).long()

    def noise(self, x0: Tensor, rng: Draws) -> Tensor:
        eps = rng.normal(x0.shape)
        if self.noise_offset:
            eps = eps + self.noise_offset * rng.normal((*x0.shape[:2], 1, 1))
        return eps

    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.levels(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self.levels(t)
        return signal * eps - noise * x0

    def weight(self, t: Tensor) -> Tensor:
        """(B,). With zero terminal SNR the eps weight is 0 / 0 at the last time; its limit is taken, s -> 0."""
        abar = self.abar.to(t.device)[t]
        snr = abar / (1 - abar).clamp(min=1e-8)
        scale = snr.clamp(min=1e-8) if self.prediction_type == "epsilon" else snr + 1
        if self.snr_gamma is not None:
            return snr.clamp(min=1e-8, max=self.snr_gamma) / scale
        if self.debiased:
            return snr.clamp(min=1e-3).sqrt() / scale.clamp(min=1e-3)
        return abar.new_ones(abar.shape)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, 1) each: sqrt(abar_t) and sqrt(1 - abar_t)."""
        abar = self.abar.to(t.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()
