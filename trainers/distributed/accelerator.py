"""What several processes owe each other: to be as many as asked for, to stop together, and to share
a frozen base."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from trainers.config import Config
from trainers.distributed import deepspeed
from trainers.distributed.collectives import TIMEOUT
from trainers.distributed.fsdp import ShardFunction, make_shard_function
from trainers.errors import UserError


def best_device() -> torch.device:
    import torch

    return (
        torch.accelerator.current_accelerator()
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


def make_accelerator(config: Config) -> tuple[Accelerator, ShardFunction | None]:
    """The accelerator, and what cuts a frozen base among its processes if FSDP2 was asked for.

    Raises: UserError when what the launcher was asked for is not what it started.
    """
    # accelerate would take FSDP on CPUs for DDP, without a word, and cut the small LoRA together
    # with the large base
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    use_deepspeed, use_cpu = deepspeed.requested(), not torch.accelerator.is_available()
    if use_deepspeed and use_fsdp:
        raise UserError("FSDP and DeepSpeed were both asked for: choose one")
    # on CPUs accelerate would leave DeepSpeed out without a word, and with it sees one process
    # unless told the backend
    accelerator = Accelerator(
        cpu=use_cpu and not use_deepspeed,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                timeout=TIMEOUT, **({"backend": "gloo"} if use_deepspeed and use_cpu else {})
            )
        ],
        **(
            {"deepspeed_plugin": deepspeed.make_plugin(config), "mixed_precision": "no"}
            if use_deepspeed
            else {}
        ),
        log_with=config.tracking.report_to or None,
        project_config=ProjectConfiguration(
            str(config.output_dir), str(config.output_dir / "tracking")
        ),
    )
    # `accelerate launch --cpu --num_processes 2` sets MASTER_PORT for two processes and then starts
    # one
    expected = int(os.environ.get("WORLD_SIZE", 2 if "MASTER_PORT" in os.environ else 1))
    if expected != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for "
            f"{'several processes' if 'WORLD_SIZE' not in os.environ else expected}, but each "
            f"sees {accelerator.num_processes}. On a CPU use: accelerate launch --multi_gpu "
            f"--num_processes 2 ..."
        )
    if use_deepspeed:
        deepspeed.check_started(accelerator)
    if (
        config.kind == "dreambooth"
        and config.model.offload
        and (use_fsdp or accelerator.num_processes > 1)
    ):
        raise UserError(
            "model.offload is for one process. Several cut the base among them: "
            "accelerate_configs/fsdp2.yaml, where "
            "fsdp_offload_params: true keeps the parts in the CPU's memory"
        )
    return accelerator, make_shard_function(config, accelerator) if use_fsdp else None
