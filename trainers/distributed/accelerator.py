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
from trainers.run_folder import TRACKING


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
    process_group, deepspeed_options = InitProcessGroupKwargs(timeout=TIMEOUT), {}
    if use_deepspeed:
        plugin = deepspeed.make_plugin(config)
        deepspeed_options = {"deepspeed_plugin": plugin, "mixed_precision": "no"}
        if use_cpu:  # unless it is told the backend each process believes that it is alone
            process_group = InitProcessGroupKwargs(timeout=TIMEOUT, backend="gloo")
    folder = config.output_dir
    accelerator = Accelerator(
        # accelerate would leave DeepSpeed out on CPUs, without a word
        cpu=use_cpu and not use_deepspeed,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        kwargs_handlers=[process_group],
        **deepspeed_options,
        log_with=config.tracking.report_to or None,
        project_config=ProjectConfiguration(str(folder), str(folder / TRACKING)),
    )
    check_num_processes(accelerator)
    if use_deepspeed:
        deepspeed.check_started(accelerator)
    is_alone = accelerator.num_processes == 1 and not use_fsdp
    if config.kind == "dreambooth" and config.model.offload and not is_alone:
        raise UserError(
            "model.offload is for one process. Several cut the base among them: "
            "accelerate_configs/fsdp2.yaml, where "
            "fsdp_offload_params: true keeps the parts in the CPU's memory"
        )
    return accelerator, make_shard_function(config, accelerator) if use_fsdp else None


def check_num_processes(accelerator: Accelerator) -> None:
    """Raises: UserError when the launcher was asked for another number than it started."""
    # for two processes `accelerate launch --cpu` sets MASTER_PORT, and then starts one
    requested = os.environ.get("WORLD_SIZE")
    expected = int(requested or (2 if "MASTER_PORT" in os.environ else 1))
    if expected != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {requested or 'several processes'}, but each "
            f"sees {accelerator.num_processes}. On a CPU use: accelerate launch --multi_gpu "
            "--num_processes 2 ..."
        )
