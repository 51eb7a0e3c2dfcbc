"""Which kernel computes the attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainers.distributed.accelerator import preferred_dtype
from trainers.errors import UserError

ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernel(name: str, device: torch.device) -> AbstractContextManager:
    """Inside, attention is by the kernel `name` wherever it can run, and else by another one.

    For auto PyTorch chooses among those that can. Forward and backward pass must both be inside:
    a checkpointed block would be computed again by another kernel, and differ by rounding.
    Raises: UserError when the kernel cannot run on the device at all.
    """
    if name == "auto":
        return nullcontext()
    x = torch.zeros(1, 1, 8, 64, device=device, dtype=preferred_dtype(device))
    try:
        with sdpa_kernel(ATTENTION_KERNELS[name]):
            F.scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        raise UserError(f"train.attention: {name} cannot run on {device}: use auto") from None
    others = [kernel for other, kernel in ATTENTION_KERNELS.items() if other != name]
    if name == "math":  # which can compute everything
        others = []
    return sdpa_kernel([ATTENTION_KERNELS[name], *others], set_priority=True)
