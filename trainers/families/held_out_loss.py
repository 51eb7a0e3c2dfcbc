"""The loss on held-out photos, in all and by how much noise there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from trainers.config.validation_metrics import HELD_OUT_LOSS, HELD_OUT_LOSSES
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.families.objective import Objective

Losses = Callable[[dict, SampleRng], Iterator[tuple[str, Tensor]]]
Draws = Callable[[dict, SampleRng], tuple[Tensor, Tensor, Tensor]]


class HeldOutLoss:
    """The trainer's own loss of micro-batches of one picture each, always by the same times and
    noise."""

    def __init__(self, batches: Sequence[DreamBoothBatches]) -> None:
        self.batches = batches
        self.bands: list[str] = []  # of each micro-batch, once it is known

    @property
    def pictures(self) -> list[Picture]:
        """Those that are measured on."""
        return list(dict.fromkeys(picture for part in self.batches for picture in part.pools[0]))

    def micro_batches(self) -> Iterator[tuple[dict, SampleRng]]:
        return chain(*(part(0) for part in self.batches))

    def measure(
        self, losses: Losses, draw: Draws, objective: Callable[[torch.Size], Objective]
    ) -> dict[str, float]:
        """The means by name, see `HELD_OUT_LOSSES`; a third of the schedule in which no time
        happens to lie has none. Empty without held-out photos.

        losses, draw: of the trainer; objective: for a height and width of latents.
        """
        if not self.bands:
            self.bands = [name_band(draw(*pair), objective) for pair in self.micro_batches()]
        values: dict[str, list[Tensor]] = {name: [] for name in HELD_OUT_LOSSES}
        for band, (batch, rng) in zip(self.bands, self.micro_batches(), strict=True):
            for _, loss in losses(batch, rng):
                values[HELD_OUT_LOSS].append(loss)
                values[band].append(loss)
        return {name: torch.stack(part).mean().item() for name, part in values.items() if part}


def name_band(
    inputs: tuple[Tensor, Tensor, Tensor], objective: Callable[[torch.Size], Objective]
) -> str:
    """The name of the loss of a micro-batch of one picture with that x0, eps and t."""
    x0, _, t = inputs
    share = objective(x0.shape[-2:]).noise_share(t).item()
    names = HELD_OUT_LOSSES[1:]
    return names[min(int(share * len(names)), len(names) - 1)]
