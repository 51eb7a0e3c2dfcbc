"""A GPU that is none: tensors of the CPU that say they are on cuda:0, with real values.

python tests/pretend_cuda.py CONFIG [section.key=value ...]

runs a config as on a GPU, and prints what a real one would refuse, where the host would wait for it
in the loop, and the peak of its memory.

Seen: operations on tensors of two devices, generators of the wrong device, device tensors given to
numpy or pinned, waits, bytes. Not seen: kernels and the precisions that they have, autocast's lists
for CUDA (those of the CPU are used), the order of streams, graphs, compilation, NCCL.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import BuiltinFunctionType, ModuleType, SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bitsandbytes
import torch
from torch import Tensor

from tests.shared.pretended_calls import PretendedCalls, is_cuda
from tests.shared.pretended_tensors import CUDA, OperationCheck, PretendedMemory
from trainers.config import loading
from trainers.run import run

TOTAL_BYTES = 80 * 2**30
PROPERTIES = SimpleNamespace(
    name="Pretended", total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=132
)


class Event:
    """An event of a stream: everything before it is done."""

    def __init__(self, *args: object, **options: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    """A stream whose work is done at once."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *args: object, **options: object) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None: ...

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def is_capturing(self) -> bool:
        return False


def modules_outside() -> list[ModuleType]:
    """The modules that are not torch's own, and may have taken a function from it."""
    loaded = list(sys.modules.items())
    return [module for key, module in loaded if key.partition(".")[0] != "torch"]


def holders_of(name: str, value: object, modules: list[ModuleType]) -> list[ModuleType]:
    """Those of the modules that have a function of torch under its name."""
    return [module for module in modules if vars(module).get(name) is value]


class PretendCuda(AbstractContextManager):
    """Inside, torch has one GPU. Import what looks for one while it is imported before.

    memory: what was refused, where the host waited, and how many bytes were taken.
    """

    def __init__(self) -> None:
        self.memory = PretendedMemory()
        self.check = OperationCheck(self.memory)
        self.stack = ExitStack()
        self.functions: list[tuple[str, object, object]] = []
        self.modules: list[ModuleType] = []

    def __enter__(self) -> PretendCuda:
        self.modules = modules_outside()
        PretendedCalls(self.memory, self.check).install(self.replace)
        for name, value in self.cuda_functions().items():
            self.replace(torch.cuda, name, value)
        self.replace(torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state)
        for name, value in accelerator_functions().items():
            self.replace(torch.accelerator, name, value)
        self.pretend_autocast()
        self.pretend_four_bits()
        tag = torch.serialization.location_tag
        holds = self.memory.holds_storage
        self.replace(
            torch.serialization, "location_tag", lambda s: "cuda:0" if holds(s) else tag(s)
        )
        self.stack.enter_context(self.check)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        # a module that was imported inside has taken ours
        modules = modules_outside()
        for name, real, value in self.functions:
            for module in holders_of(name, value, modules):
                setattr(module, name, real)

    def replace(self, owner: object, name: str, value: object) -> None:
        real = getattr(owner, name, None)
        self.stack.enter_context(mock.patch.object(owner, name, value, create=True))
        if owner is torch and isinstance(real, BuiltinFunctionType):
            self.functions.append((name, real, value))
            # `from torch import tensor` in a library that was imported before
            for module in holders_of(name, real, self.modules):
                self.stack.enter_context(mock.patch.object(module, name, value))

    def cuda_functions(self) -> dict[str, object]:
        memory = self.memory

        def live_bytes(device: object = None) -> int:
            return memory.live_bytes

        def peak_bytes(device: object = None) -> int:
            return memory.peak_bytes

        def free_and_total(device: object = None) -> tuple[int, int]:
            return TOTAL_BYTES - memory.live_bytes, TOTAL_BYTES

        return constant_functions() | {
            "memory_allocated": live_bytes,
            "memory_reserved": live_bytes,
            "max_memory_allocated": peak_bytes,
            "max_memory_reserved": peak_bytes,
            "mem_get_info": free_and_total,
            "reset_peak_memory_stats": memory.reset_peak,
            "Stream": Stream,
            "Event": Event,
        }

    def pretend_autocast(self) -> None:
        autocast = torch.amp.autocast_mode.autocast
        start = autocast.__init__

        def begin(context: object, device_type: str, *args, **options) -> None:
            start(context, "cpu" if device_type == "cuda" else device_type, *args, **options)

        self.replace(autocast, "__init__", begin)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            self.replace(torch, name, as_on_cpu(getattr(torch, name)))
        for name in ("set_autocast_enabled", "set_autocast_dtype"):
            self.replace(torch, name, as_on_cpu(getattr(torch, name)))

    def pretend_four_bits(self) -> None:
        """bitsandbytes keeps the values of a type by device."""
        real = bitsandbytes.functional.get_4bit_type

        def values(typename: str, device: object = None, blocksize: int = 64) -> Tensor:
            made = real(typename, "cpu", blocksize)
            return self.memory.put(made.clone()) if is_cuda(device) else made

        self.replace(bitsandbytes.functional, "get_4bit_type", values)


def as_on_cpu(function):
    def call(*args):
        return function(*("cpu" if a == "cuda" else a for a in args))

    return call


def constant_functions() -> dict[str, object]:
    """Those of `torch.cuda` that say the same always, or do nothing."""
    values = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "get_device_properties": PROPERTIES,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_stream": Stream(),
        "default_stream": Stream(),
        "stream": nullcontext(),
        "device": nullcontext(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    }
    silent = (
        "set_device synchronize empty_cache ipc_collect manual_seed manual_seed_all init "
        "_lazy_init set_rng_state set_rng_state_all"
    ).split()
    values |= dict.fromkeys(silent)
    return {name: constant(value) for name, value in values.items()}


def constant(value: object):
    def give(*args: object, **options: object) -> object:
        return value

    return give


def accelerator_functions() -> dict[str, object]:
    values = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_device_index": 0,
        "device_count": 1,
        "current_stream": Stream(),
        "synchronize": None,
    }
    return {name: constant(value) for name, value in values.items()}


def report(memory: PretendedMemory) -> str:
    """A line for each refusal and each line of the loop that waits, and one for the memory."""
    lines = [f"refused, {count} times: {mix}" for mix, count in memory.mixes.items()]
    waits: dict[str, int] = {}
    for wait, count in memory.waits.items():
        if wait.step is not None:
            line = f"{wait.place}, line {wait.line}: {wait.what}"
            waits[line] = waits.get(line, 0) + count
    lines += [f"waits, {count} times: {line}" for line, count in sorted(waits.items())]
    return "\n".join([*lines, f"peak memory: {memory.peak_bytes / 2**20:.2f} MiB"])


if __name__ == "__main__":
    settings = loading.load_config(Path(sys.argv[1]), sys.argv[2:])
    with PretendCuda() as gpu:
        run(settings)
    print(report(gpu.memory))
    sys.exit(bool(gpu.memory.mixes))
