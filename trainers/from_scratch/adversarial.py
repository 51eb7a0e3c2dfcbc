"""Losses of a generator and its discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

ScoreLoss = Callable[[Tensor, Tensor], Tensor]


softplus, relu = F.softplus, F.relu


# (discriminator's loss, generator's loss) of scores real, made
LOSSES: dict[str, tuple[ScoreLoss, ScoreLoss]] = {
    "non_saturating": (
        lambda r, m: (softplus(-r) + softplus(m)).mean(),
        lambda r, m: softplus(-m).mean(),
    ),
    "hinge": (lambda r, m: (relu(1 - r) + relu(1 + m)).mean(), lambda r, m: -m.mean()),
    "wasserstein": (lambda r, m: (m - r).mean(), lambda r, m: -m.mean()),
    "relativistic": (lambda r, m: softplus(m - r).mean(), lambda r, m: softplus(r - m).mean()),
}


@contextmanager
def freeze(module: nn.Module) -> Iterator[None]:
    """Inside, gradients go through the module and not into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
