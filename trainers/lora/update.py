"""The low-rank update B A of a layer's weight, whatever a file calls the layer and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to a layer's weight: B A, with the scale folded into B.

    a (r, in, ...) and b (out, r, ...) are float32; further dimensions are those of a kernel.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)

    def delta_weight(self) -> Tensor:
        """The product B A, (out, in x kernel)."""
        return self.b.flatten(1) @ self.a.flatten(1)


# By component and module, as in "unet.mid_block.attentions.0.proj_in".
Lora = dict[str, LoraUpdate]

# Every layer of a base model that LoRA can be on, by the same names, and its number of outputs.
Layers = Mapping[str, int]


def stack_updates(updates: Sequence[LoraUpdate | None], outputs: Sequence[int]) -> LoraUpdate:
    """The update of one layer whose rows are several layers; None: that layer has no update.

    outputs: how many rows each layer has. The result is exact. Its rank is the sum of theirs, or
    their own where all of them share one `a`.
    """
    if len(updates) == 1:
        return updates[0]
    present = [update for update in updates if update]
    first = present[0]
    shares_a = all(torch.equal(update.a, first.a) for update in present)
    if shares_a and len(present) == len(updates):
        return LoraUpdate(first.a, torch.cat([update.b for update in present]))
    # b is block-diagonal: each layer's rows read the columns of its own a alone
    b = torch.zeros(sum(outputs), sum(update.rank for update in present))
    row = column = 0
    for update, height in zip(updates, outputs, strict=True):
        if update:
            b[row : row + height, column : column + update.rank] = update.b
            column += update.rank
        row += height
    return LoraUpdate(torch.cat([update.a for update in present]), b)


def split_update(update: LoraUpdate, outputs: Sequence[int]) -> list[LoraUpdate | None]:
    """The inverse of `stack_updates`; None where nothing is added to a layer."""
    if len(outputs) == 1:
        return [update]
    parts = []
    for b in update.b.split(list(outputs)):
        # columns of zeros belong to another layer
        used = b.abs().sum(0) > 0
        parts.append(LoraUpdate(update.a[used], b[:, used]) if used.any() else None)
    return parts


def max_relative_difference(a: Lora, b: Lora) -> float:
    """The largest relative difference (Frobenius norm) between the updates of a layer.

    Infinite where one of the two has no update for a layer of the other.
    """
    if a.keys() != b.keys():
        return float("inf")
    largest = 0.0
    for name, update in a.items():
        expected = update.delta_weight()
        difference = expected - b[name].delta_weight()
        largest = max(largest, float(difference.norm() / expected.norm().clamp_min(1e-30)))
    return largest
