"""What several processes owe each other: to be as many as asked for, to stop together, and to share
a frozen base."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, is_bf16_available

from trainers.config import Config
from trainers.distributed import deepspeed
from trainers.distributed.collectives import TIMEOUT
from trainers.distributed.fsdp import ShardFunction, make_shard_function
from trainers.errors import UserError
from trainers.run_folder import TRACKING

# Variables that accelerate reads: the values that a run can do with, and what to do about others.
# `accelerate launch` sets most of them from its flags and its YAML file.
LAUNCHER_CHOICES = {
    "ACCELERATE_MIXED_PRECISION": (
        ("no", "fp16", "bf16"),
        "use no, fp16 or bf16; for 8-bit weights set model.quantization=fp8",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (("no", ""), "use no here, and train.compile=true in the config"),
    "ACCELERATE_USE_MEGATRON_LM": (("false", ""), "use FSDP2 or DeepSpeed instead"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false", ""), "use FSDP2 or DeepSpeed instead"),
}
# as accelerate calls them
PRECISION_NAMES = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Variables that say what a key of `train` says too.
CONFIG_OWNED_VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}


def best_device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def preferred_dtype(device: torch.device) -> torch.dtype:
    """The precision for what is not trained: float32 on a CPU, else the half precision.

    That is bfloat16 where the accelerator computes in it, and float16 on older ones.
    """
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = is_bf16_available()
    if device.type == "cuda":
        # older cards only emulate it, which is slow
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def make_accelerator(config: Config) -> tuple[Accelerator, ShardFunction | None]:
    """The accelerator, and what cuts a frozen base among its processes if FSDP2 was asked for.

    Raises: UserError when what the launcher was asked for is not what it started.
    """
    check_environment(config, os.environ)
    # accelerate would take FSDP on CPUs for DDP, without a word, and cut the small LoRA together
    # with the large base
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    use_deepspeed, use_cpu = deepspeed.requested(), not torch.accelerator.is_available()
    if use_deepspeed and use_fsdp:
        raise UserError("FSDP and DeepSpeed were both asked for: choose one")
    process_group, deepspeed_plugin = InitProcessGroupKwargs(timeout=TIMEOUT), None
    mixed_precision = choose_mixed_precision(config, os.environ)
    if use_deepspeed:
        # `deepspeed.compute_dtype` reads it from there
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
        deepspeed_plugin, mixed_precision = deepspeed.make_plugin(config), "no"
        if use_cpu:  # unless it is told the backend each process believes that it is alone
            process_group = InitProcessGroupKwargs(timeout=TIMEOUT, backend="gloo")
    folder = config.output_dir
    accelerator = Accelerator(
        # accelerate would leave DeepSpeed out on CPUs, without a word
        cpu=use_cpu and not use_deepspeed,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        kwargs_handlers=[process_group],
        deepspeed_plugin=deepspeed_plugin,
        mixed_precision=mixed_precision,
        log_with=config.tracking.report_to or None,
        project_config=ProjectConfiguration(str(folder), str(folder / TRACKING)),
    )
    complete_float16(accelerator)
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


def complete_float16(accelerator: Accelerator) -> None:
    """On a CPU, give float16 its autocast and the scale of its loss.

    PyTorch has both there; accelerate leaves them out, without a word.
    """
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")


def choose_mixed_precision(config: Config, environment: Mapping[str, str]) -> str:
    """The launcher's choice where it made one, else that of `train.mixed_precision`."""
    # the launcher says no also when it was told nothing
    launcher = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher != "no":
        return launcher
    if config.train.mixed_precision != "auto":
        return config.train.mixed_precision
    return PRECISION_NAMES[preferred_dtype(best_device())]


def record_precision(config: Config, accelerator: Accelerator) -> Config:
    """The config with the precision that the run has."""
    name = PRECISION_NAMES[deepspeed.compute_dtype(accelerator)]
    train = config.train.model_copy(update={"mixed_precision": name})
    return config.model_copy(update={"train": train})


def check_environment(config: Config, environment: Mapping[str, str]) -> None:
    """Refuse what accelerate reads from the environment and would prefer to the config.

    Raises: UserError that names the variable and the key.
    """
    for name, (supported, advice) in LAUNCHER_CHOICES.items():
        value = environment.get(name, supported[0])
        if value.lower() not in supported:
            raise UserError(f"{name}={value} in the environment is not supported: {advice}")
    for name, key in CONFIG_OWNED_VARIABLES.items():
        value, number = environment.get(name), getattr(config.train, key)
        # DeepSpeed's launcher fills in values of its own; make_plugin compares them
        if value is None or deepspeed.requested() or is_number(value, number):
            continue
        raise UserError(
            f"{name}={value} in the environment contradicts train.{key}={number}, which alone "
            f"decides: unset the variable, or set train.{key}={value}"
        )


def is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


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
