"""What every objective has. Pure tensor maths that knows no model.

Shapes: x0 and eps (B, C, h, w), clean latents and unit Gaussian noise; t (B,), on x0's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trainers.data.rng import SampleRng
from trainers.families.losses import WidthSchedule, huber_width, sample_means, smooth_l1, with_last


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What all objectives share; a subclass says what is noised, how, and what is regressed.

    t_range: the least and the largest share of the schedule that is trained, as of `noise_share`.

    loss, huber_c, huber_schedule: see `losses`.

    input_perturbation: g of x_t made from eps + g xi, while eps is regressed (Ning et al. 2023).
    """

    stratified: bool = True
    t_range: tuple[float, float] = (0.0, 1.0)
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_c: float = 0.1
    huber_schedule: WidthSchedule = "snr"
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
        self, t: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, *last: Tensor
    ) -> Tensor:
        """The loss of each sample (B,), see `sample_means`; last: as for `with_last`."""
        difference = prediction.float() - with_last(target, *last)
        return sample_means(self.distance(difference, t), weight)

    def distance(self, difference: Tensor, t: Tensor) -> Tensor:
        """The loss of each element, (B, C, h, w)."""
        if self.loss == "l2":
            return difference.square()
        c = self.huber_width(t).view(-1, 1, 1, 1)
        smooth = smooth_l1(difference, c)
        return smooth if self.loss == "smooth_l1" else c * smooth

    def huber_width(self, t: Tensor) -> Tensor:
        """(B,)"""
        share, ratio = self.noise_share(t), self.noise_to_signal(t)
        return huber_width(self.huber_schedule, self.huber_c, share, ratio)
