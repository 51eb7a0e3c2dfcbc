"""How the denoiser's blocks run: what they keep for the backward pass, and compiled or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.distributed.fsdp import get_blocks


def enable_checkpointing(denoiser: nn.Module, kind: bool | Literal["selective"]) -> None:
    """Have none, all or every second one of the blocks compute again what they would keep.

    That is in the backward pass; selective stands for every second one.
    """
    block_numbers: dict[nn.Module, int] = {}

    def checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
        if kind == "selective" and block_numbers.setdefault(block, len(block_numbers)) % 2:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    if kind:
        denoiser.enable_gradient_checkpointing(checkpoint_block)


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile the blocks, for training; shapes are fixed there, and not where pictures are made."""
    blocks = get_blocks(denoiser)
    # a block whose input has no gradient is compiled once more
    torch._dynamo.config.recompile_limit = 2 * len(blocks)
    # so that all faults come in the forward pass, where the plain one can take over
    torch._functorch.config.force_non_lazy_backward_lowering = True
    failed: list[Exception] = []
    for block in blocks:
        compiled_forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
        block.forward = with_fallback(block, block.forward, compiled_forward, failed)


def with_fallback(
    block: nn.Module, eager: Callable, compiled_forward: Callable, failed: list[Exception]
) -> Callable:
    """The block's forward pass: fast in training, until one of them has failed."""

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if block.training and not failed:
            try:
                return compiled_forward(*args, **kwargs)
            except (
                torch._dynamo.exc.TorchDynamoException,
                torch._dynamo.exc.FailOnRecompileLimitHit,
            ) as error:
                failed.append(error)
                message = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"train.compile: the compiler failed ({message}); training goes on without",
                    stacklevel=2,
                )
        return eager(*args, **kwargs)

    return forward
