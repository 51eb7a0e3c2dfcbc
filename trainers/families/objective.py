"""What every objective has: the loss of an element and of a sample, and noise.

Shapes: x0 and eps (B, C, h, w), clean latents and unit Gaussian noise; t (B,), on x0's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.data.rng import SampleRng


def sample_means(error: Tensor, weight: Tensor | None) -> Tensor:
    """The error of each sample, (B, C, h, w) to (B,).

    weight: (B, 1, h, w), by which the mean is taken: so the loss has the same scale whatever part
    of a picture its mask shows. A sample of which nothing counts gives 0. None: a plain mean.
    """
    if weight is None:
        return error.mean((1, 2, 3))
    shown = weight.mean((1, 2, 3))
    return (weight * error).mean((1, 2, 3)) / shown.clamp(min=torch.finfo(shown.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What all objectives share; a subclass says what is noised, how, and what is regressed.

    t_range: the least and the largest share of the schedule that is trained, as of `noise_share`.

    Losses of an element with the error d: l2, d^2; pseudo-Huber, 2 c (sqrt(d^2 + c^2) - c), which
    is l2 for d far below c and 2 c |d| far above; smooth_l1, that over c. Their width c falls with
    the noise, to `huber_c` where all is noise (Khrapov et al. 2024): exponential, c^share; snr,
    (1 - c) / (1 + noise / signal)^2 + c.

    input_perturbation: g of x_t made from eps + g xi, while eps is regressed (Ning et al. 2023).
    """

    stratified: bool = True
    t_range: tuple[float, float] = (0.0, 1.0)
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_c: float = 0.1
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    input_perturbation: float = 0.0

    @abstractmethod
    def times(self, rng: SampleRng) -> Tensor: ...
    @abstractmethod
    def noise(self, x0: Tensor, rng: SampleRng) -> Tensor: ...
    @abstractmethod
    def corrupt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    @abstractmethod
    def weight(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def noise_share(self, t: Tensor) -> Tensor:
        """(B,): where the times lie in the schedule, from 0 to 1, which is noise."""

    @abstractmethod
    def noise_to_signal(self, t: Tensor) -> Tensor:
        """(B,): the factor of the noise in x_t over that of the picture."""

    def perturbed(self, eps: Tensor, rng: SampleRng) -> Tensor:
        """The noise of which x_t is made."""
        if not self.input_perturbation:
            return eps
        return eps + self.input_perturbation * rng.normal(eps.shape)

    def error(
        self,
        t: Tensor,
        prediction: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample (B,), see `sample_means`.

        last: (b, C, h, w), the target of the last samples instead.
        """
        if last is not None:
            target = torch.cat([target[: -len(last)], last.float()])
        return sample_means(self.distance(prediction.float() - target, t), weight)

    def distance(self, difference: Tensor, t: Tensor) -> Tensor:
        """The loss of each element, (B, C, h, w)."""
        square = difference.square()
        if self.loss == "l2":
            return square
        c = self.huber_width(t).view(-1, 1, 1, 1)
        # sqrt(d^2 + c^2) - c would be 0 for a small d
        smooth = 2 * square / ((square + c.square()).sqrt() + c)
        return smooth if self.loss == "smooth_l1" else c * smooth

    def huber_width(self, t: Tensor) -> Tensor:
        """(B,)"""
        match self.huber_schedule:
            case "exponential":
                return self.huber_c ** self.noise_share(t)
            case "snr":
                return (1 - self.huber_c) / (1 + self.noise_to_signal(t)).square() + self.huber_c
        return torch.full(t.shape, self.huber_c, device=t.device)


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
