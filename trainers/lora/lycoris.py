"""LoKr and LoHa (LyCORIS: Yeh et al. 2024): updates of a weight that are no plain product B A.

LoKr is the Kronecker product of two factors, LoHa the elementwise product of two, and a factor may
itself be a product of low rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.lora.svd import svd_of_product

LOKR, LOHA = "lokr", "loha"
# LyCORIS's names of the two factors, which are whole or the two halves of a product
FACTORS = {LOKR: ("lokr_w1", "lokr_w2"), LOHA: ("hada_w1", "hada_w2")}
HALVES = ("_a", "_b")


def tensor_names(kind: str) -> list[str]:
    """The names of the tensors that a layer of this kind may have."""
    return [factor + half for factor in FACTORS[kind] for half in ("", *HALVES)]


def has_lycoris(names: Iterable[str]) -> bool:
    """Whether tensors of a file are those of LoKr or LoHa, by their names."""
    beginnings = tuple(factor for kind in FACTORS for factor in FACTORS[kind])
    return any(name.rpartition(".")[2].startswith(beginnings) for name in names)


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """Of a layer's whole tensors."""
    return LOHA if "hada_w1_a" in tensors else LOKR


@dataclass(frozen=True)
class LycorisUpdate:
    """What LoKr or LoHa adds to a layer's weight; the scale is folded into the first factor.

    tensors: float32, by LyCORIS's names; shape: the weight's. Of LoKr w1 is (a, c) and w2
    (b, d, ...) for a weight (a b, c d, ...); a product has the kernel in its second dimension.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    magnitude: None = None  # there is no DoRA of it here

    @classmethod
    def scaled(
        cls, tensors: Mapping[str, Tensor], scale: float, shape: Sequence[int]
    ) -> LycorisUpdate:
        """Of tensors that have a scale beside them."""
        first = FACTORS[kind_of(tensors)][0]
        name = first if first in tensors else f"{first}_a"
        return cls({**tensors, name: tensors[name] * scale}, tuple(shape))

    @property
    def kind(self) -> str:
        return kind_of(self.tensors)

    @property
    def rank(self) -> int:
        """The width of the products; of whole factors the side that makes PEFT keep them so."""
        for factor in reversed(FACTORS[self.kind]):
            if f"{factor}_b" in self.tensors:
                return len(self.tensors[f"{factor}_b"])
        return max(self.tensors["lokr_w2"].shape[:2])

    def factor(self, name: str) -> Tensor:
        """A factor as a matrix, with the kernel in its second dimension."""
        if name in self.tensors:
            return self.tensors[name].flatten(1)
        return self.tensors[f"{name}_a"] @ self.tensors[f"{name}_b"]

    def delta_weight(self) -> Tensor:
        """(out, in x kernel), by the rules of ComfyUI and LyCORIS."""
        first, second = map(self.factor, FACTORS[self.kind])
        return first * second if self.kind == LOHA else torch.kron(first, second)

    def apply_to(self, weight: Tensor) -> Tensor:
        """The weight (out, in, ...) with this update, in float64."""
        return weight.double() + self.delta_weight().double().view_as(weight)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """u (out, r), s (r,), the largest first, and v (r, in x kernel) of the update, in float64.

        Those of a Kronecker product are the products of its factors'. An elementwise product of
        ranks r and r' is a plain one of rank r r'.
        """
        if self.kind == LOHA:
            tall, wide = (
                [self.tensors[factor + half].double() for factor in FACTORS[LOHA]]
                for half in HALVES
            )
            b = (tall[0][:, :, None] * tall[1][:, None]).flatten(1)
            a = (wide[0][:, None] * wide[1][None]).flatten(0, 1)
            return svd_of_product(b, a)
        parts = []
        for factor in FACTORS[LOKR]:
            parts.append(torch.linalg.svd(self.factor(factor).double(), full_matrices=False))
        u, s, v = (torch.kron(first, second) for first, second in zip(*parts, strict=True))
        order = s.argsort(descending=True)
        return u[:, order], s[order], v[order]
