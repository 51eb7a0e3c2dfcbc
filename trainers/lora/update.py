"""The low-rank update B A of a layer's weight, whatever a file calls the layer and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainers.lora.lycoris import LycorisUpdate


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to a layer's weight: B A, with the scale folded into B.

    a (r, in, ...) and b (out, r, ...) are float32; further dimensions are those of a kernel.
    magnitude (out,) is that of DoRA (Liu et al. 2024), which rescales the rows of W + B A to it.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def delta_weight(self) -> Tensor:
        """The product B A, (out, in x kernel)."""
        return self.b.flatten(1) @ self.a.flatten(1)

    def apply_to(self, weight: Tensor) -> Tensor:
        """The weight (out, in, ...) with this update, in float64."""
        updated = weight.double() + self.delta_weight().view_as(weight)
        if self.magnitude is None:
            return updated
        norm = updated.flatten(1).norm(dim=1)
        rows = (self.magnitude.double() / norm).view(-1, *[1] * (weight.ndim - 1))
        return rows * updated


# By component and module, as in "unet.mid_block.attentions.0.proj_in".
Lora = dict[str, LoraUpdate | LycorisUpdate]

# Every layer of a base model that LoRA can be on, by the same names, and its number of outputs.
Layers = Mapping[str, int]


@dataclass(frozen=True)
class Rows:
    """What a layer of a file is in the base: one layer, or several that are its rows."""

    layers: tuple[str, ...]
    # whether the file has the two halves of the outputs, scale and shift, in the other order
    swaps_halves: bool = False


def is_dora(lora: Lora) -> bool:
    return any(update.magnitude is not None for update in lora.values())


def is_lycoris(lora: Lora) -> bool:
    """Whether the updates are LoKr or LoHa, which are no plain product B A."""
    return any(isinstance(update, LycorisUpdate) for update in lora.values())


def swap_halves(update: LoraUpdate) -> LoraUpdate:
    """The update with the two halves of its outputs in the other order."""
    return replace(update, b=update.b.roll(len(update.b) // 2, 0))


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
            b[row : row + height, column : column + update.rank] = update.b.flatten(1)
            column += update.rank
        row += height
    return LoraUpdate(torch.cat([update.a for update in present]), b)


def split_update(update: LoraUpdate, outputs: Sequence[int]) -> list[LoraUpdate | None]:
    """The inverse of `stack_updates`; None where nothing is said of a layer.

    A layer that never trained has a `b` of zeros. Its columns are those that no layer uses.
    """
    if len(outputs) == 1:
        return [update]
    blocks = update.b.split(list(outputs))
    used = torch.stack([block.flatten(1).abs().sum(0) > 0 for block in blocks])
    columns = [own.nonzero()[:, 0] for own in used]
    for i, own in untrained_columns(used).items():
        columns[i] = own
    parts = []
    for block, own in zip(blocks, columns, strict=True):
        parts.append(LoraUpdate(update.a[own], block[:, own]) if len(own) else None)
    return parts


def untrained_columns(used: Tensor) -> dict[int, Tensor]:
    """The columns of each layer that uses none, from `used` (layers, r): who uses which."""
    untrained = [i for i, columns in enumerate(used) if not columns.any()]
    counts = used.sum(0)
    # in a shared `a` several layers use a column, and one that uses none shares it too
    if (counts > 1).any() or not counts.any():
        return dict.fromkeys(untrained, torch.arange(len(counts)))
    spare = (counts == 0).nonzero()[:, 0]
    return dict(zip(untrained, spare.tensor_split(max(len(untrained), 1)), strict=False))


def max_relative_difference(a: Lora, b: Lora) -> float:
    """The largest relative difference (Frobenius norm) between the updates of a layer.

    A layer without an update is one whose update is zero. Infinite where `a` changes nothing and
    `b` does.
    """
    largest = 0.0
    for name in a.keys() | b.keys():
        largest = max(largest, relative_difference(a.get(name), b.get(name)))
    return largest


def relative_difference(a: LoraUpdate | None, b: LoraUpdate | None) -> float:
    """||B A - B' A'|| / ||B A||, or the same of the magnitudes of DoRA where it is larger."""
    if isinstance(a, LycorisUpdate) or isinstance(b, LycorisUpdate):
        none = torch.zeros(())
        expected, found = (update.delta_weight().double() if update else none for update in (a, b))
        return divide(float((expected - found).norm()), float(expected.norm()))
    if a and b and torch.equal(a.a, b.a) and torch.equal(a.b, b.b):
        difference = 0.0
    else:
        difference = divide(norm_of_sum(a, b), norm_of_sum(a, None))
    magnitudes = [update.magnitude if update else None for update in (a, b)]
    if magnitudes[0] is None and magnitudes[1] is None:
        return difference
    if magnitudes[0] is None or magnitudes[1] is None:
        return float("inf")
    expected, found = magnitudes
    return max(difference, divide(float((expected - found).norm()), float(expected.norm())))


def divide(difference: float, whole: float) -> float:
    if difference == 0:
        return 0.0
    return difference / whole if whole else float("inf")


def norm_of_sum(a: LoraUpdate | None, b: LoraUpdate | None) -> float:
    """The Frobenius norm of B A - B' A', by QR of the factors.

    [B, -B'] = Q R and [A; A']' = P T give ||R T'||, with memory for (out + in) x (r + r') numbers
    alone: the product of a wide layer would need a gigabyte.
    """
    signed = [(update, sign) for update, sign in ((a, 1), (b, -1)) if update]
    if not signed:
        return 0.0
    left = torch.cat([sign * update.b.flatten(1).double() for update, sign in signed], dim=1)
    right = torch.cat([update.a.flatten(1).double() for update, _ in signed])
    # mode r: Q is not needed
    r = torch.linalg.qr(left, mode="r").R
    t = torch.linalg.qr(right.T, mode="r").R
    return float((r @ t.T).norm())
