"""From the host to the device, without the host waiting for the copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the device.

    From ordinary memory CUDA copies only what it has copied to pinned memory first, while the host
    waits. The allocator of pinned memory gives none of it away before it has been copied.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def send_numbers(numbers: Sequence[int], device: torch.device | str) -> Tensor:
    """(N,) int64 on the device."""
    return send(torch.tensor(numbers), device)
