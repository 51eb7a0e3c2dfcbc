"""How the denoiser's blocks run: what they keep for the backward pass, compiled or not, with which
attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from trainers.distributed.fsdp import get_blocks
from trainers.errors import UserError


def enable_checkpointing(denoiser: nn.Module, kind: bool | Literal["selective"]) -> None:
    """Have blocks recompute in the backward pass what they would keep: none, all, or every second
    one."""
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
    torch._dynamo.config.recompile_limit = 2 * len(
        blocks
    )  # a block whose input has no gradient is another one
    torch._functorch.config.force_non_lazy_backward_lowering = (
        True  # so that all faults come in the forward pass
    )
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


def capture_cuda_graphs(module: nn.Module, inputs: tuple, accelerator: Accelerator) -> None:
    """Make the module's training pass and its backward pass a CUDA graph each, for inputs like
    these.

    Raises: UserError where there is no GPU, or where several must talk meanwhile.
    """
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise UserError("train.cuda_graphs: needs one process on a CUDA GPU: drop it")
    forward, static_inputs = (
        module.forward,
        tree_map_only(Tensor, torch.clone, inputs),
    )  # the graph's, and written to
    torch.cuda.make_graphed_callables(module.train(), static_inputs, allow_unused_input=True)
    module.forward = wraps(forward)(
        module.forward
    )  # accelerate takes its own wrappers off by `__wrapped__`
