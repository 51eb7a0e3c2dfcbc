"""What Python asks of tensors, answered as if there were a GPU: devices, copies, factories.

They replace attributes of torch, for modes of torch are off where a block is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.shared.pretended_tensors import (
    CPU,
    CUDA,
    OperationCheck,
    PretendedMemory,
    is_pinned,
    pin,
)

FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace "
    "normal ones ones_like rand rand_like randint randint_like randn randn_like randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros zeros_like"
).split()
TENSOR_FACTORIES = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()
FROM_HOST = ("as_tensor", "asarray", "new_tensor", "tensor")  # which copy what Python gives them

Replace = Callable[[object, str, object], None]  # an owner's attribute, and its value until the end


def is_cuda(device: object) -> bool:
    """Of a device, its name or its number."""
    if isinstance(device, int):
        return True
    return device is not None and torch.device(device).type == "cuda"


def generator_class(memory: PretendedMemory) -> type[torch.Generator]:
    """Generators of the CPU that say where they were asked to be."""

    class PretendedGenerator(torch.Generator):
        def __new__(cls, device: object = "cpu"):
            self = super().__new__(cls, "cpu")
            if is_cuda(device):
                memory.generators[self._cdata] = self
            return self

        @property
        def device(self) -> torch.device:
            return CUDA if self._cdata in memory.generators else CPU

    return PretendedGenerator


class Move(torch.autograd.Function):
    """A copy on the other device; the gradient comes back the same way."""

    @staticmethod
    def forward(ctx, x: Tensor, memory: PretendedMemory, on_device: bool) -> Tensor:
        ctx.memory, ctx.was_on_device = memory, memory.holds(x)
        return copy_to(x, memory, on_device)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return copy_to(gradient, ctx.memory, ctx.was_on_device), None, None


def copy_to(x: Tensor, memory: PretendedMemory, on_device: bool) -> Tensor:
    # without the check, for which the copy would be a tensor of the first device
    with torch.utils._python_dispatch._disable_current_modes():
        copy = x.detach().clone()
    return memory.put(copy) if on_device else copy


class PretendedCalls:
    """The functions that stand in for torch's own while `replace` holds."""

    def __init__(self, memory: PretendedMemory, check: OperationCheck) -> None:
        self.memory, self.check = memory, check
        self.real_to = Tensor.to

    def install(self, replace: Replace) -> None:
        # torch looks once for the functions whose device `torch.device(...)` as a context decides
        with torch.device("meta"):
            torch.empty(0)
        for name in FACTORIES:
            replace(torch, name, self.factory(getattr(torch, name)))
        for name in TENSOR_FACTORIES:
            replace(Tensor, name, self.factory(getattr(Tensor, name)))
        replace(torch, "Generator", generator_class(self.memory))
        replace(torch.nn.functional, "one_hot", self.one_hot(torch.nn.functional.one_hot))
        replace(torch._C._nn, "pad_sequence", self.padding(torch._C._nn.pad_sequence))
        self.install_places(replace)
        self.install_copies(replace)

    def install_places(self, replace: Replace) -> None:
        memory, real_device = self.memory, Tensor.device.__get__
        group = torch._C._group_tensors_by_device_and_dtype

        def device(x: Tensor) -> torch.device:
            return CUDA if memory.holds(x) else real_device(x)

        def grouped(lists: list, with_indices: bool = False) -> dict:
            groups = group(lists, with_indices).items()
            return {
                (next(x for x in tensors[0] if x is not None).device, dtype): (tensors, indices)
                for (_, dtype), (tensors, indices) in groups
            }

        replace(Tensor, "device", property(device))
        replace(Tensor, "is_cuda", property(memory.holds))
        replace(Tensor, "get_device", lambda x: 0 if memory.holds(x) else -1)
        replace(Tensor, "is_pinned", lambda x, device=None: is_pinned(x))
        replace(torch._C, "_group_tensors_by_device_and_dtype", grouped)

    def install_copies(self, replace: Replace) -> None:
        memory, real_numpy, real_tolist = self.memory, Tensor.numpy, Tensor.tolist

        def to(x: Tensor, *args, **options) -> Tensor:
            return self.convert(x, *args, **options)

        def cpu(x: Tensor, *args, **options) -> Tensor:
            return self.convert(x, CPU)

        def cuda(x: Tensor, device=None, non_blocking: bool = False, **options) -> Tensor:
            return self.convert(x, CUDA, non_blocking=non_blocking)

        def numpy(x: Tensor, *args, **options):
            if memory.holds(x):
                memory.refuse("a tensor of cuda:0 cannot become an array")
            return real_numpy(x, *args, **options)

        def tolist(x: Tensor) -> list:
            if memory.holds(x):
                memory.wait("tolist")
            return real_tolist(x)

        def pin_memory(x: Tensor, *args) -> Tensor:
            if memory.holds(x):
                memory.refuse("a tensor of cuda:0 cannot be pinned")
            return x if is_pinned(x) else pin(x.detach().clone())

        for function in (to, cpu, cuda, numpy, tolist, pin_memory):
            replace(Tensor, function.__name__, function)
        replace(Tensor, "record_stream", lambda x, stream: None)

    def factory(self, function: Callable) -> Callable:
        """A function that makes a tensor where it is told, or else where the given one is."""

        def make(*args, **options):
            asked = options.pop("device", None)
            source = args[0] if args and isinstance(args[0], Tensor) else None
            if asked is None and source is not None and self.memory.holds(source):
                asked = CUDA
            if asked is not None:
                options["device"] = CPU if is_cuda(asked) else asked
            is_pinned_memory = options.pop("pin_memory", False)
            previous = self.check.factory_device
            self.check.factory_device = CUDA if is_cuda(asked) else CPU
            try:
                made = function(*args, **options)
            finally:
                self.check.factory_device = previous
            if is_pinned_memory:
                pin(made)
            return self.placed(function.__name__, made, source, asked)

        make.__name__ = function.__name__
        return make

    def placed(self, name: str, made: Tensor, source: Tensor | None, asked: object) -> Tensor:
        """What a factory has made, where it was asked to be."""
        if made.is_meta:
            return made
        if name in FROM_HOST:
            if name in ("as_tensor", "asarray") and source is not None:
                return made if asked is None else self.convert(made, asked)
            if is_cuda(asked):
                self.memory.wait("a tensor of numbers of the host")
        return self.memory.put(made) if is_cuda(asked) else self.memory.take(made)

    def one_hot(self, function: Callable) -> Callable:
        """It asks for zeros on the real device; told the number of classes, CUDA reads nothing."""

        def encode(ids: Tensor, num_classes: int = -1) -> Tensor:
            if not self.memory.holds(ids):
                return function(ids, num_classes)
            if num_classes < 0:
                self.memory.wait("one_hot without a number of classes")
            return self.move(function(self.move(ids, CPU), num_classes), CUDA)

        return encode

    def padding(self, function: Callable) -> Callable:
        """It makes its result where the sequences are, and asks for that out of Python's sight."""

        def pad(sequences: list[Tensor], *args, **options) -> Tensor:
            previous = self.check.factory_device
            self.check.factory_device = CUDA if self.memory.holds(sequences[0]) else CPU
            try:
                return function(sequences, *args, **options)
            finally:
                self.check.factory_device = previous

        return pad

    def convert(
        self, x: Tensor, *args, non_blocking: bool = False, copy: bool = False, **options
    ) -> Tensor:
        """`Tensor.to`: (device, dtype, non_blocking, copy), (dtype, non_blocking, copy) or
        (other)."""
        for like in [a for a in (*args, options.pop("other", None)) if isinstance(a, Tensor)]:
            args = like.device, like.dtype
        flags = [a for a in args if isinstance(a, bool)]
        places = [a for a in args if isinstance(a, str | torch.device | int) and a not in flags]
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        target = options.pop("device", places[0] if places else None)
        dtype = options.pop("dtype", dtypes[0] if dtypes else None) or x.dtype
        non_blocking, copy = non_blocking or any(flags[:1]), copy or any(flags[1:2])
        if target is not None and not is_cuda(target) and torch.device(target).type != "cpu":
            return self.real_to(x, target, dtype, non_blocking, copy, **options)
        if x.is_meta and target is not None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        is_move = target is not None and is_cuda(target) != self.memory.holds(x)
        cast = self.real_to(x, dtype, copy=copy and not is_move, **options)
        if not is_move:
            return cast
        self.memory.note_copy(x, is_cuda(target), non_blocking)
        return self.move(cast, target)

    def move(self, x: Tensor, target: object) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return Move.apply(x, self.memory, is_cuda(target))
        return copy_to(x, self.memory, is_cuda(target))
