"""How far a prediction is from its target: of an element, and as the mean of a sample.

Losses of an element with the error d: l2, d^2; pseudo-Huber, 2 c (sqrt(d^2 + c^2) - c), which is l2
for d far below c and 2 c |d| far above; smooth_l1, that over c. The width c falls with the noise,
to the config's where all is noise (Khrapov et al. 2024): exponential, c^share; snr,
(1 - c) / (1 + noise / signal)^2 + c.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

WidthSchedule = Literal["snr", "exponential", "constant"]


def smooth_l1(difference: Tensor, c: Tensor) -> Tensor:
    """Of elements; c: their width, which broadcasts."""
    square = difference.square()
    # sqrt(d^2 + c^2) - c would be 0 for a small d
    return 2 * square / ((square + c.square()).sqrt() + c)


def huber_width(
    schedule: WidthSchedule, c: float, noise_share: Tensor, noise_to_signal: Tensor
) -> Tensor:
    """(B,), of times with these (B,)."""
    match schedule:
        case "exponential":
            return c**noise_share
        case "snr":
            return (1 - c) / (1 + noise_to_signal).square() + c
    return torch.full_like(noise_share, c)


def sample_means(error: Tensor, weight: Tensor | None) -> Tensor:
    """The error of each sample, (B, C, h, w) to (B,).

    weight: (B, 1, h, w), by which the mean is taken: so the loss has the same scale whatever part
    of a picture its mask shows. A sample of which nothing counts gives 0. None: a plain mean.
    """
    if weight is None:
        return error.mean((1, 2, 3))
    shown = weight.mean((1, 2, 3))
    return (weight * error).mean((1, 2, 3)) / shown.clamp(min=torch.finfo(shown.dtype).tiny)


def with_last(target: Tensor, last: Tensor | None = None) -> Tensor:
    """The targets (B, C, h, w), of which the last samples have others (b, C, h, w) instead."""
    return target if last is None else torch.cat([target[: -len(last)], last.float()])
