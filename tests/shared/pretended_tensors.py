"""Which tensors pretend to be on a GPU, and what a real one would say of each operation on them.

A tensor is there if its storage is marked. Operations are seen below autograd, also those of the
backward pass and of recomputed blocks.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor  # while they are torch's own
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.training import loop

PACKAGE = str(Path(loop.__file__).resolve().parents[1])
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# these need a value, or a shape that depends on values
WAITING = {
    aten._local_scalar_dense.default: "a value is read: item, bool, int or float",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._linalg_check_errors.default: "a decomposition looks for errors",
}


class DeviceMixError(RuntimeError):
    """What CUDA refuses: tensors, or a tensor and a generator, of two devices."""


@dataclass(frozen=True)
class Wait:
    """The host waited for the device.

    place: the innermost function of the package, as folder/file.py:function, and its line; step: of
    the loop, from 0, None outside.
    """

    place: str
    line: int
    what: str
    step: int | None

    @classmethod
    def here(cls, what: str) -> Wait:
        place, line, step = "elsewhere", 0, None
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if place == "elsewhere" and code.co_filename.startswith(PACKAGE):
                name = code.co_filename[len(PACKAGE) + 1 :]
                place, line = f"{name}:{code.co_qualname}", frame.f_lineno
            if step is None and code is loop.train.__code__:
                step = frame.f_locals.get("step")
            frame = frame.f_back
        return cls(place, line, what, step)


class PretendedMemory:
    """The marked storages: `live_bytes` now and `peak_bytes`; what was refused and waited for."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self.mixes: Counter[str] = Counter()
        self.waits: Counter[Wait] = Counter()
        # those of the device, kept so that no other one gets the address of one that is gone
        self.generators: dict[int, Generator] = {}

    def holds(self, x: Tensor) -> bool:
        try:
            return self.holds_storage(x.untyped_storage())
        except (NotImplementedError, RuntimeError):  # a tensor without a storage
            return False

    def holds_storage(self, storage: torch.UntypedStorage) -> bool:
        return getattr(storage, "memory", None) is self

    def reset_peak(self, device: object = None) -> None:
        self.peak_bytes = self.live_bytes

    def put(self, x: Tensor) -> Tensor:
        """Mark a tensor that is on the CPU; others, as of the meta device, stay what they are."""
        try:
            storage = x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return x
        if storage.device.type == "cpu" and not self.holds_storage(storage):
            storage.memory, size = self, storage.nbytes()
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            storage.freed = weakref.finalize(storage, self.free, size)
        return x

    def take(self, x: Tensor) -> Tensor:
        """Unmark a tensor that nothing else shares."""
        if self.holds(x):
            storage = x.untyped_storage()
            storage.memory = None
            storage.freed()
        return x

    def free(self, size: int) -> None:
        self.live_bytes -= size

    def wait(self, what: str) -> None:
        self.waits[Wait.here(what)] += 1

    def refuse(self, message: str) -> None:
        """Raises: DeviceMixError. It is also noted, for a run outlives some errors."""
        wait = Wait.here(message)
        self.mixes[f"{wait.place}, line {wait.line}: {message}"] += 1
        raise DeviceMixError(message)

    def note_copy(self, source: Tensor, to_device: bool, non_blocking: bool) -> None:
        """A copy between the devices."""
        if not source.numel():
            return
        if not to_device:
            if not non_blocking:
                self.wait("a copy to the CPU")
        elif not is_pinned(source):
            self.wait("a copy of unpinned memory")
        elif not non_blocking:
            self.wait("a copy that is not non_blocking")


def is_pinned(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "is_pinned_memory", False)


def pin(x: Tensor) -> Tensor:
    x.untyped_storage().is_pinned_memory = True
    return x


class OperationCheck(TorchDispatchMode):
    """Refuses what CUDA refuses, notes where it waits, and marks what an operation makes.

    factory_device: where a tensor that Python asks for without giving one is to be made.
    """

    def __init__(self, memory: PretendedMemory) -> None:
        super().__init__()
        self.memory = memory
        self.factory_device: torch.device | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, memory = kwargs or {}, self.memory
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        there = [x for x in given if memory.holds(x)]
        if there and function not in COPIES:
            self.check_devices(function, args, given, there)
            self.check_waiting(function, args)
        if function is aten.copy_.default and memory.holds(args[0]) != memory.holds(args[1]):
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            memory.note_copy(args[1], memory.holds(args[0]), non_blocking)
        is_there = bool(there) if given else self.makes_on_device()
        for generator in leaves:
            if isinstance(generator, Generator):
                self.check_generator(function, generator, is_there)
        outputs = function(*args, **kwargs)
        if is_there and function is not aten.copy_.default:
            for x in tree_leaves(outputs):
                if isinstance(x, Tensor):
                    memory.put(x)
        return outputs

    def makes_on_device(self) -> bool:
        """Whether what is made of nothing is there: by the factory, or by the autograd engine.

        The engine makes zeros like what it differentiates, and asks no Python for them.
        """
        if self.factory_device is not None:
            return self.factory_device.type == "cuda"
        return torch._C._current_graph_task_id() != -1

    def check_devices(self, function, args, given: list[Tensor], there: list[Tensor]) -> None:
        here = [x for x in given if not self.memory.holds(x) and x.device.type == "cpu"]
        name = function.name().removeprefix("aten::")
        if function in INDEXING:
            # indices may be on the CPU
            wrong = [] if self.memory.holds(args[0]) else there
        elif name.startswith(("cat", "stack", "_fused", "_foreach_copy")):
            wrong = here
        else:
            # numbers of the CPU are read before the kernel starts
            wrong = [x for x in here if x.dim()]
        changed = args[0] if args and function._schema.is_mutable else None
        if isinstance(changed, Tensor) and any(changed is x for x in here):
            wrong = [changed]
        if wrong:
            shapes = [[tuple(x.shape) for x in group[:4]] for group in (there, wrong)]
            self.memory.refuse(f"{name}: on cuda:0 {shapes[0]}, on the CPU {shapes[1]}")

    def check_waiting(self, function, args) -> None:
        if function in WAITING:
            self.memory.wait(WAITING[function])
        if function in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and not self.memory.holds(index):
                    self.memory.wait("an index of the CPU")
                elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.memory.wait("an index by a mask")

    def check_generator(self, function, generator: Generator, is_there: bool) -> None:
        # an operation sees the generator through another object of Python
        found = "cuda" if generator._cdata in self.memory.generators else "cpu"
        kind = "cuda" if is_there else "cpu"
        if found != kind:
            self.memory.refuse(f"{function.name()}: a {found} generator for a {kind} tensor")
