"""Which kernel computes the attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from trainers.errors import UserError

ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class AttentionRecorder(TorchFunctionMode):
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


def time_kernel(name: str, calls: Iterable[tuple[dict, int]]) -> float:
    """Forward and backward of all calls with this kernel; endless where it cannot run one."""
    from torch.utils.benchmark import Timer  # it imports setuptools

    total = 0.0
    for call, count in calls:
        inputs = [call[which].detach().requires_grad_() for which in ("query", "key", "value")]
        options = {
            which: value for which, value in call.items() if which not in ("query", "key", "value")
        }

        def both(inputs=inputs, rest=options) -> None:
            output = F.scaled_dot_product_attention(*inputs, **rest)
            torch.autograd.grad(output, inputs, output)

        with sdpa_kernel(ATTENTION_KERNELS[name]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel that cannot run tells why in six of them
            try:
                total += (
                    count
                    * Timer("both()", globals={"both": both})
                    .blocked_autorange(min_run_time=0.05)
                    .median
                )
            except RuntimeError:
                return math.inf
    return total


def choose_attention(
    requested: str, module: nn.Module, inputs: tuple, accelerator: Accelerator
) -> AbstractContextManager:
    """Inside, attention is by the kernel `requested`; for auto by the fastest for what the module
    calls.

    Where it cannot run, as perhaps in the autoencoder, another one does. Raises: UserError.
    """
    with AttentionRecorder() as recorder, torch.no_grad():
        module.eval()(*inputs)
    names = (
        [name for name in ATTENTION_KERNELS if name != "math"]
        if requested == "auto"
        else [requested]
    )
    with accelerator.autocast():
        seconds = {name: time_kernel(name, recorder.calls.values()) for name in names}
    best, fastest = broadcast_object_list([*min(seconds.items(), key=lambda item: item[1])])
    if fastest == math.inf and requested == "auto":
        return nullcontext()
    if fastest == math.inf:
        raise UserError(
            f"train.attention: {requested} cannot run on {accelerator.device} what the model "
            f"calls: use auto"
        )
    others = (
        []
        if best == "math"
        else [kernel for name, kernel in ATTENTION_KERNELS.items() if name != best]
    )
    return sdpa_kernel([ATTENTION_KERNELS[best], *others], set_priority=True)
