"""DeepSpeed ZeRO-2 and ZeRO-3: Adam's state and the gradients are cut among the processes, by
ZeRO-3 the weights too.

DeepSpeed clips, steps and skips by itself, within `accelerator.backward`. Nothing is cast: LoRA is
float32 on a base in bfloat16, and what trains whole is float32 under autocast, as everywhere.
Checkpoints are those of one plain process.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from trainers.config import Config
from trainers.distributed.trained_weights import trainable_parameters, trainable_state
from trainers.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


# of a DeepSpeed file: the config and the launcher say these
CONFIG_OWNED_KEYS = ("optimizer", "scheduler", "fp16", "bf16")


def requested() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of ZeRO: 2 or 3, or 0 without DeepSpeed."""
    use_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin.zero_stage if use_deepspeed else 0


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision that the launcher asked for."""
    name = accelerator.mixed_precision
    if zero_stage(accelerator):
        name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)


def make_plugin(config: Config) -> DeepSpeedPlugin:
    """What the launcher asked for, with this config's batches and clipping. Raises: UserError."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install deepspeed")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs a launcher: accelerate launch --config_file "
            "accelerate_configs/deepspeed_zero2.yaml ..."
        )
    import deepspeed

    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    # else it compiles, for more than a minute, what only inference uses
    if not torch.accelerator.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train = config.train
    numbers = {
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
    }
    launcher_values = {
        name: os.environ.pop(f"ACCELERATE_{name.upper()}", "auto") for name in numbers
    }
    plugin = DeepSpeedPlugin(**numbers, zero3_init_flag=False)
    settings = plugin.deepspeed_config
    for name, number in numbers.items():
        for value in (launcher_values[name], settings.get(name, "auto")):
            # 1 is what accelerate fills in
            if value not in ("auto", "none") and float(value) not in (1, number):
                raise UserError(
                    f"DeepSpeed was asked for {name} {value}: only the config says it, there it "
                    f"is {number}"
                )
    settings |= numbers | {
        "train_micro_batch_size_per_gpu": train.train_batch_size,
        "train_batch_size": "auto",
    }
    for error in plugin_errors(config, plugin):
        raise UserError(f"DeepSpeed: {error}")
    return plugin


def plugin_errors(config: Config, plugin: DeepSpeedPlugin) -> list[str]:
    """What was asked for and is not supported, each with what to do."""
    train, settings = config.train, plugin.deepspeed_config
    owned = [name for name in CONFIG_OWNED_KEYS if name in settings]
    devices = {plugin.offload_optimizer_device, plugin.offload_param_device}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    checks = [
        (
            plugin.zero_stage not in (2, 3),
            f"ZeRO stage {plugin.zero_stage} was asked for: set zero_stage: 2 or 3",
        ),
        (
            owned,
            f"remove {', '.join(owned)} from its file: the config has the optimizer, "
            "mixed_precision the precision",
        ),
        (
            devices - {"none"},
            "offloading to the CPU is not supported: set offload_optimizer_device and "
            "offload_param_device: none",
        ),
        (
            precision not in ("no", "bf16"),
            f"set mixed_precision: bf16 or no, not {precision}",
        ),
        *untried(config),
        (
            not config.can_accumulate,
            "it trains one network, and here are two: use accelerate_configs/multi_gpu.yaml",
        ),
        (
            config.optimizer.name != "adamw",
            f"it can shard the state of optimizer.name=adamw, not that of {config.optimizer.name}",
        ),
        (
            train.auto_micro_batch,
            "micro-batches are fixed: set train.auto_micro_batch=false and a "
            "train.train_batch_size that fits",
        ),
    ]
    errors = [message for is_wrong, message in checks if is_wrong]
    return errors + (zero3_errors(config) if plugin.zero_stage == 3 else [])


def untried(config: Config) -> list[tuple[bool, str]]:
    """What DreamBooth has that nobody has trained with it."""
    if config.kind != "dreambooth":
        return []
    return [
        (
            config.data.preserves_outputs,
            "data.prior=output_preservation has not been tried with it: use "
            "accelerate_configs/multi_gpu.yaml or fsdp2.yaml, or set data.prior=class_images",
        ),
        (
            config.lora is not None and config.lora.type != "lora",
            "lora.type has been tried with it as lora alone: use "
            "accelerate_configs/multi_gpu.yaml, or set lora.type=lora",
        ),
    ]


def zero3_errors(config: Config) -> list[str]:
    """What does not work where the weights themselves are sharded."""
    is_dreambooth = config.kind == "dreambooth"
    quantization = config.model.quantization if is_dreambooth else "none"
    checks = [
        (
            not is_dreambooth,
            "ZeRO-3 shards the weights, and this network is small: use "
            "accelerate_configs/deepspeed_zero2.yaml",
        ),
        (
            config.train.ema_decay,
            "with ZeRO-3 no process has the weights to average: remove train.ema_decay, or use "
            "ZeRO-2",
        ),
        (
            quantization != "none",
            f"ZeRO-3 cannot shard {quantization} weights: set model.quantization=none, or use "
            "ZeRO-2",
        ),
        (
            is_dreambooth and config.model.modulation_cache,
            "ZeRO-3 needs whole forward passes: set model.modulation_cache=false, or use ZeRO-2",
        ),
        (
            config.hub.push_every,
            "with ZeRO-3 weights are put together at the end only: remove hub.push_every; "
            "hub.push_to_hub works",
        ),
    ]
    return [message for is_wrong, message in checks if is_wrong]


def check_started(accelerator: Accelerator) -> None:
    """Raises: UserError when accelerate left DeepSpeed out."""
    if not zero_stage(accelerator):
        raise UserError(
            "DeepSpeed was asked for and did not start: set use_cpu: false, also without a GPU"
        )
    unset_hf_deepspeed_config()  # else transformers loads no weights with ZeRO-3


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """As `accelerator.prepare`, with autocast inside; the optimizer remembers its parameters."""
    dtype = compute_dtype(accelerator)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    if dtype != torch.float32:
        # as accelerate does, whose `unwrap_model` undoes it
        module._original_forward = module.forward
        compute = torch.autocast(accelerator.device.type, dtype)(module.forward.__func__)
        module.forward = MethodType(convert_outputs_to_fp32(compute), module)
    engine, optimizer = accelerator.prepare(
        module.to(memory_format=torch.contiguous_format), optimizer
    )
    optimizer.groups = groups
    return engine, optimizer


def gathered_weights(module: nn.Module, accelerator: Accelerator) -> AbstractContextManager:
    """A context in which each process has all trained weights; every process must enter it."""
    if zero_stage(accelerator) < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(trainable_parameters(module).values()))


def partitions(optimizer: Any) -> tuple[torch.optim.AdamW, list[Tensor]]:
    """The AdamW inside and this process's parts of the float32 weights, with a state even before
    the first step."""
    zero = optimizer.optimizer
    adam = zero.optimizer
    # ZeRO-3's name, then ZeRO-2's
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)
    flats = zero.single_partition_of_fp32_groups if flats is None else flats
    for flat in flats:
        if not adam.state[flat]:
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            adam.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    # ZeRO-2 itself links the first group only
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return adam, flats


def gather_state(module: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict]:
    """Weights by name and a plain AdamW's `state_dict`; every process must come."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    adam, flats = partitions(optimizer)
    count, state, groups = adam.state[flats[0]]["step"].cpu(), {}, []
    weights = {
        name: safe_get_full_fp32_param(p).cpu() for name, p in trainable_parameters(module).items()
    }
    for params, group in zip(optimizer.groups, optimizer.param_groups, strict=True):
        first = len(state)
        for p in params:
            moments = {name: safe_get_full_optimizer_state(p, name).cpu() for name in MOMENTS}
            state[len(state)] = {"step": count.clone(), **moments}
        groups.append({**group, "params": list(range(first, len(state)))})
    return trainable_state(module) | weights, {"state": state, "param_groups": groups}


@torch.no_grad()
def restore_state(
    module: nn.Module, optimizer: Any, weights: dict[str, Tensor], plain: dict
) -> None:
    """The reverse of `gather_state`; every process must come."""
    from deepspeed import utils, zero

    adam, flats = partitions(optimizer)
    trained = trainable_parameters(module)
    with zero.GatheredParameters(list(trained.values()), modifier_rank=0):
        for name, tensor in trainable_state(module).items():
            tensor.copy_(weights[name])

    def scatter(p: nn.Parameter, value: Tensor, kind: str, *name: str) -> None:
        value = value.to(p.device)
        if hasattr(p, "ds_tensor"):  # cut by ZeRO-3, the last part being padded
            size = p.ds_tensor.numel()
            padded = torch.cat(
                [value.flatten(), value.new_zeros(size * dist.get_world_size() - value.numel())]
            )
            getattr(utils, f"safe_set_local_{kind}")(p, padded.split(size)[dist.get_rank()], *name)
        else:
            getattr(utils, f"safe_set_full_{kind}")(p, value, *name)

    for name, p in trained.items():
        scatter(p, weights[name], "fp32_param")
    for i, p in enumerate(chain(*optimizer.groups)):
        for name in MOMENTS:
            scatter(p, plain["state"][i][name], "optimizer_state", name)
    for flat in flats:
        adam.state[flat]["step"].fill_(float(plain["state"][0]["step"]))
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        group |= {name: value for name, value in saved.items() if name != "params"}
