"""How the denoiser's blocks run: what they keep for the backward pass, compiled or not, with which attention."""

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

from trainers.distributed.fsdp import blocks_of
from trainers.errors import UserError


def checkpointed(denoiser: nn.Module, kind: bool | Literal["selective"]) -> None:
    """Have blocks recompute in the backward pass what they would keep: none, all, or every second one."""
    seen: dict[nn.Module, int] = {}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if kind == "selective" and seen.setdefault(block, len(seen)) % 2:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    if kind:
        denoiser.enable_gradient_checkpointing(run)


def compiled(denoiser: nn.Module) -> None:
    """Compile the blocks, for training; shapes are fixed there, and not where pictures are made."""
    blocks = blocks_of(denoiser)
    torch._dynamo.config.recompile_limit = 2 * len(blocks)  # a block whose input has no gradient is another one
    torch._functorch.config.force_non_lazy_backward_lowering = True  # so that all faults come in the forward pass
    failed: list[Exception] = []
    for block in blocks:
        fast = torch.compile(block.forward, dynamic=False, fullgraph=True)
        block.forward = either(block, block.forward, fast, failed)


def either(block: nn.Module, plain: Callable, fast: Callable, failed: list[Exception]) -> Callable:
    """The block's forward pass: fast in training, until one of them has failed."""

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if block.training and not failed:
            try:
                return fast(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                failed.append(error)
                said = " ".join(str(error).split())[:300]
                warnings.warn(f"train.compile: the compiler failed ({said}); training goes on without", stacklevel=2)
        return plain(*args, **kwargs)

    return forward


def graphed(module: nn.Module, inputs: tuple, accelerator: Accelerator) -> None:
    """Make the module's training pass and its backward pass a CUDA graph each, for inputs like these.

    Raises: UserError where there is no GPU, or where several must talk meanwhile.
    """
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise UserError("train.cuda_graphs: needs one process on a CUDA GPU: drop it")
    plain, own = module.forward, tree_map_only(Tensor, torch.clone, inputs)  # the graph's, and written to
    torch.cuda.make_graphed_callables(module.train(), own, allow_unused_input=True)
    module.forward = wraps(plain)(module.forward)  # accelerate takes its own wrappers off by `__wrapped__`
