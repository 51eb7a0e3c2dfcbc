"""B A of one layer, whatever a file calls it"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to a layer's weight, B A, with the scale folded in: a (r, in, ...), b (out, r,
    ...), float32."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)

    def delta_weight(self) -> Tensor:
        """(out, in x kernel)."""
        return self.b.flatten(1) @ self.a.flatten(1)


Lora = dict[str, LoraUpdate]  # by component and module, as in "unet.mid_block.attentions.0.proj_in"


Layers = Mapping[str, int]  # every layer of a base that LoRA can be on, and its outputs


def stack_updates(updates: Sequence[LoraUpdate | None], outputs: Sequence[int]) -> LoraUpdate:
    """The update of a layer whose rows are several layers; exact, at the sum of their ranks unless
    they share one a."""
    if len(updates) == 1:
        return updates[0]
    present = [update for update in updates if update]
    if len(present) == len(updates) and all(
        torch.equal(update.a, present[0].a) for update in present
    ):
        return LoraUpdate(present[0].a, torch.cat([update.b for update in present]))
    b, row, column = torch.zeros(sum(outputs), sum(update.rank for update in present)), 0, 0
    for update, height in zip(updates, outputs, strict=True):
        if update:
            b[row : row + height, column : column + update.rank] = update.b
            column += update.rank
        row += height
    return LoraUpdate(torch.cat([update.a for update in present]), b)


def split_update(update: LoraUpdate, outputs: Sequence[int]) -> list[LoraUpdate | None]:
    """The inverse of `stack_updates`; None where nothing is added."""
    if len(outputs) == 1:
        return [update]
    parts = []
    for b in update.b.split(list(outputs)):
        used = b.abs().sum(0) > 0
        parts.append(LoraUpdate(update.a[used], b[:, used]) if used.any() else None)
    return parts
