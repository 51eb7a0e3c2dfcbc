"""How the denoiser's blocks run: what they keep for the backward pass, compiled or not, with which attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from . import UserError, zero
from .processes import blocks_of

if TYPE_CHECKING:
    from .dreambooth import DreamBooth

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def tune(task: DreamBooth) -> None:
    """Choose how the denoiser's blocks run, by a first batch. Raises: UserError."""
    train, accelerator = task.config.train, task.accelerator
    if train.compile:
        if task.family.shard or zero.stage(accelerator):
            raise UserError("train.compile: cannot be had with FSDP2 or DeepSpeed: drop it")
        compiled(task.family.denoiser)
    if train.attention == "auto" and accelerator.device.type != "cuda" and not train.cuda_graphs:
        return  # on a CPU there is one good kernel, and a clock would make runs differ
    _, inputs = next(task.coming(0))
    task.attention = attend(train.attention, task.players["denoiser"].module, inputs, accelerator)
    task.attention.__enter__()  # for as long as the task is there
    if train.cuda_graphs:
        graphed(task.module, inputs, accelerator)


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


class Recorder(TorchFunctionMode):
    """Keeps the calls of attention that differ, each with how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[dict, int]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            key = str(tree_map_only(Tensor, lambda x: (x.shape, x.stride(), x.dtype), call))
            self.calls[key] = call, self.calls.get(key, (call, 0))[1] + 1
        return function(*args, **kwargs)


def seconds(name: str, calls: Iterable[tuple[dict, int]]) -> float:
    """Forward and backward of all calls with this kernel; endless where it cannot run one."""
    from torch.utils.benchmark import Timer  # it imports setuptools

    total = 0.0
    for call, count in calls:
        inputs = [call[which].detach().requires_grad_() for which in ("query", "key", "value")]
        rest = {which: value for which, value in call.items() if which not in ("query", "key", "value")}

        def both(inputs=inputs, rest=rest) -> None:
            output = F.scaled_dot_product_attention(*inputs, **rest)
            torch.autograd.grad(output, inputs, output)

        with sdpa_kernel(KERNELS[name]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel that cannot run tells why in six of them
            try:
                total += count * Timer("both()", globals={"both": both}).blocked_autorange(min_run_time=0.05).median
            except RuntimeError:
                return math.inf
    return total


def attend(wish: str, module: nn.Module, inputs: tuple, accelerator: Accelerator) -> AbstractContextManager:
    """Inside, attention is by the kernel `wish`; for auto by the fastest for what the module calls.

    Where it cannot run, as perhaps in the autoencoder, another one does. Raises: UserError.
    """
    with Recorder() as recorder, torch.no_grad():
        module.eval()(*inputs)
    names = [name for name in KERNELS if name != "math"] if wish == "auto" else [wish]
    with accelerator.autocast():
        took = {name: seconds(name, recorder.calls.values()) for name in names}
    best, fastest = broadcast_object_list([*min(took.items(), key=lambda item: item[1])])
    if fastest == math.inf and wish == "auto":
        return nullcontext()
    if fastest == math.inf:
        raise UserError(f"train.attention: {wish} cannot run on {accelerator.device} what the model calls: use auto")
    others = [] if best == "math" else [kernel for name, kernel in KERNELS.items() if name != best]
    return sdpa_kernel([KERNELS[best], *others], set_priority=True)


def graphed(module: nn.Module, inputs: tuple, accelerator: Accelerator) -> None:
    """Make the module's training pass and its backward pass a CUDA graph each, for inputs like these.

    Raises: UserError where there is no GPU, or where several must talk meanwhile.
    """
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise UserError("train.cuda_graphs: needs one process on a CUDA GPU: drop it")
    plain, own = module.forward, tree_map_only(Tensor, torch.clone, inputs)  # the graph's, and written to
    torch.cuda.make_graphed_callables(module.train(), own, allow_unused_input=True)
    module.forward = wraps(plain)(module.forward)  # accelerate takes its own wrappers off by `__wrapped__`
