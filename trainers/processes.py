"""What several processes owe each other: to be as many as asked for, to stop together, and to share a frozen base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from math import ceil
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from . import UserError, zero
from .sections import Config

Shard = Callable[[nn.Module], None]
T = TypeVar("T")
WAIT = timedelta(hours=1)  # for another process, which may be sampling, exporting or downloading


def make_accelerator(config: Config) -> tuple[Accelerator, Shard | None]:
    """The accelerator, and what cuts a frozen base among its processes if FSDP2 was asked for.

    Raises: UserError when what the launcher was asked for is not what it started.
    """
    # accelerate would take FSDP on CPUs for DDP, without a word, and cut the small LoRA together with the large base
    sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deep, on_cpu = zero.asked(), not torch.accelerator.is_available()
    if deep and sharded:
        raise UserError("FSDP and DeepSpeed were both asked for: choose one")
    # on CPUs accelerate would leave DeepSpeed out without a word, and with it sees one process unless told the backend
    accelerator = Accelerator(
        cpu=on_cpu and not deep,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT, **({"backend": "gloo"} if deep and on_cpu else {}))],
        **({"deepspeed_plugin": zero.make_plugin(config), "mixed_precision": "no"} if deep else {}),
        log_with=config.tracking.report_to or None,
        project_config=ProjectConfiguration(str(config.output_dir), str(config.output_dir / "tracking")),
    )
    # `accelerate launch --cpu --num_processes 2` sets MASTER_PORT for two processes and then starts one
    wanted = int(os.environ.get("WORLD_SIZE", 2 if "MASTER_PORT" in os.environ else 1))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {'several processes' if 'WORLD_SIZE' not in os.environ else wanted}, but each "
            f"sees {accelerator.num_processes}. On a CPU use: accelerate launch --multi_gpu --num_processes 2 ..."
        )
    if deep:
        zero.started(accelerator)
    if config.kind == "dreambooth" and config.model.offload and (sharded or accelerator.num_processes > 1):
        raise UserError(
            "model.offload is for one process. Several cut the base among them: accelerate_configs/fsdp2.yaml, where "
            "fsdp_offload_params: true keeps the parts in the CPU's memory"
        )
    return accelerator, sharding(config, accelerator) if sharded else None


def sharding(config: Config, accelerator: Accelerator) -> Shard:
    """Raises: UserError where there is no frozen base, or where its weights cannot be cut."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(
            f"FSDP {plugin.fsdp_version} was asked for: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml"
        )
    if config.kind != "dreambooth" or config.lora is None:
        raise UserError("FSDP2 cuts the frozen base of a LoRA among the processes, and here nothing is frozen: use DDP")
    if config.model.quantization in ("int8", "fp8"):
        raise UserError(f"FSDP2 cannot cut weights in {config.model.quantization}: use model.quantization: nf4 or none")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    how = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    return partial(shard, mesh=mesh, **how)


def shard(model: nn.Module, **how) -> None:
    """Cut the frozen weights of a diffusers model, block by block (FSDP2); each process keeps its part.

    What trains stays whole in each: `DistributedDataParallel` averages its gradients, and leaves the rest alone.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into one
    trained = {p for p in model.parameters() if p.requires_grad}
    for module in (*reversed(blocks_of(model)), model):
        fully_shard(module, ignored_params=trained, **how)
    for parameter in trained:
        parameter.data = parameter.data.to(how["mesh"].device_type)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Those of a diffusers model that compute one after another."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def cut(module: nn.Module, accelerator: Accelerator) -> list[str]:
    """The names of the parameters of which this process has a part only; how large a part is told."""
    parts = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    if parts:
        held, whole = sum(p.to_local().numel() for p in parts.values()), sum(p.numel() for p in parts.values())
        accelerator.print(f"FSDP2: each process holds {held / whole:.1%} of the base's {whole:,} weights")
    return list(parts)


class Crew:
    """All processes of the run. They talk over the network alone, so that no accelerator is waited for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.group = dist.new_group(backend="gloo", timeout=WAIT) if accelerator.num_processes > 1 else None

    def agree(self, *values: int) -> list[int]:
        """The largest of each among the processes."""
        if self.group is None:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """What `work` gives in the main process, None in the others. A UserError there ends all of them, told once."""
    result, status = None, [0]
    try:
        if accelerator.is_main_process:
            result = work()
    except UserError as error:
        status = [error.status]
        raise
    finally:
        broadcast_object_list(status)
    if status[0]:
        raise SystemExit(status[0])
    return result


def equal_share(items: Sequence[T], accelerator: Accelerator) -> list[T]:
    """This process's items: each has as many, as a base that is cut needs, so some may be done twice."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return [items[i % len(items)] for i in range(rank, world * ceil(len(items) / world), world)]


def in_turns(jobs: Sequence[Callable[[], T]], accelerator: Accelerator) -> list[T]:
    """What the jobs give, in order, the work being shared among the processes."""
    world, each = accelerator.num_processes, ceil(len(jobs) / accelerator.num_processes)
    done = gather_object([job() for job in equal_share(jobs, accelerator)])
    return [done[(i % world) * each + i // world] for i in range(len(jobs))]
