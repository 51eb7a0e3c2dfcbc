"""What several processes owe each other: to be as many as asked for, to stop together, and to share a frozen base."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from trainers.config import Config
from trainers.distributed import deepspeed
from trainers.distributed.collectives import WAIT
from trainers.distributed.fsdp import Shard, sharding
from trainers.errors import UserError


def best_device() -> torch.device:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def make_accelerator(config: Config) -> tuple[Accelerator, Shard | None]:
    """The accelerator, and what cuts a frozen base among its processes if FSDP2 was asked for.

    Raises: UserError when what the launcher was asked for is not what it started.
    """
    # accelerate would take FSDP on CPUs for DDP, without a word, and cut the small LoRA together with the large base
    sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deep, on_cpu = deepspeed.asked(), not torch.accelerator.is_available()
    if deep and sharded:
        raise UserError("FSDP and DeepSpeed were both asked for: choose one")
    # on CPUs accelerate would leave DeepSpeed out without a word, and with it sees one process unless told the backend
    accelerator = Accelerator(
        cpu=on_cpu and not deep,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT, **({"backend": "gloo"} if deep and on_cpu else {}))],
        **({"deepspeed_plugin": deepspeed.make_plugin(config), "mixed_precision": "no"} if deep else {}),
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
        deepspeed.started(accelerator)
    if config.kind == "dreambooth" and config.model.offload and (sharded or accelerator.num_processes > 1):
        raise UserError(
            "model.offload is for one process. Several cut the base among them: accelerate_configs/fsdp2.yaml, where "
            "fsdp_offload_params: true keeps the parts in the CPU's memory"
        )
    return accelerator, sharding(config, accelerator) if sharded else None
