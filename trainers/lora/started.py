"""LoRA that starts with a part of the base's weight: PiSSA and OLoRA.

Both put a part B0 A0 of the weight W into A and B, and take it from the base. Here the base stays
as it is and the layer takes it off: W + s (B A - B0 A0) is the same weight, exactly in any
precision. So with the LoRA off it is the base, and what is written, of twice the rank, fits the
base as everybody has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainers.errors import UserError
from trainers.lora.lora_linear import LoraLinear
from trainers.lora.svd import svd_of_product

ADAPTER = "default"
ITERATIONS = 16  # of the randomized SVD: PEFT calls this start pissa_niter_16


class StartedLinear(LoraLinear):
    """W + s (B A - B0 A0); B0 and A0 are buffers, which a checkpoint has too."""

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        return torch.cat([a.weight, a.start]), torch.cat([b.weight, -b.start], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        a, b = self.factors(adapter)
        return self.scaling[adapter] * b @ a

    @torch.no_grad()
    def small_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B of the same update by its singular values, on the CPU.

        A reader in half precision rounds factors by their size, and those that are trained are as
        large as the part of the base, of which the update may be little.
        """
        a, b = (factor.cpu().double() for factor in self.factors(adapter))
        u, s, v = svd_of_product(b, a)
        root = s.sqrt()
        return root[:, None] * v, u * root


@torch.no_grad()
def start_from_base(module: nn.Module, start: str) -> None:
    """Let every LoRA layer of a module start with a part of its base's weight.

    Raises: UserError for a rank that is more than a weight has.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, StartedLinear):
            raise UserError(
                f"lora.init_lora_weights: {start} is for linear layers, and lora.target_modules "
                f"names {name}: leave convolutions out, or set gaussian"
            )
        weight, rank = layer.get_base_layer().weight.detach().float(), layer.r[ADAPTER]
        if rank > min(weight.shape):
            raise UserError(
                f"lora.init_lora_weights: {start} takes a part of each weight, and {name} "
                f"({weight.shape[0]} x {weight.shape[1]}) has none of rank {rank}: lower lora.rank "
                "or its own in lora.rank_pattern"
            )
        parts = STARTS[start](weight, rank, layer.scaling[ADAPTER])
        for factor, part in zip((layer.lora_A, layer.lora_B), parts, strict=True):
            factor[ADAPTER].weight.copy_(part)
            factor[ADAPTER].register_buffer("start", part.contiguous(), persistent=False)


def principal_part(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a (r, in) and b (out, r) of the largest singular values, scale b a (Meng et al. 2024)."""
    u, s, v = torch.svd_lowrank(weight, min(2 * rank, *weight.shape), niter=ITERATIONS)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def orthonormal_part(weight: Tensor, rank: int, _: float) -> tuple[Tensor, Tensor]:
    """a (r, in) and b (out, r) of the QR decomposition (Buyukakyuz 2024): b is orthonormal."""
    # Q's first columns depend on as many columns of the weight alone
    q = torch.linalg.qr(weight[:, :rank]).Q
    return q.T @ weight, q


STARTS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": principal_part,
    "olora": orthonormal_part,
}
