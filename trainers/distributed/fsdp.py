"""A frozen base that is cut among several GPUs (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainers.config import Config
from trainers.errors import UserError

ShardFunction = Callable[[nn.Module], None]


def make_shard_function(config: Config, accelerator: Accelerator) -> ShardFunction:
    """Raises: UserError where there is no frozen base, or where its weights cannot be cut."""
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(
            f"FSDP {plugin.fsdp_version} was asked for: set fsdp_version: 2, as "
            f"accelerate_configs/fsdp2.yaml"
        )
    if config.kind != "dreambooth" or config.lora is None:
        raise UserError(
            "FSDP2 cuts the frozen base of a LoRA among the processes, and here nothing is "
            "frozen: use DDP"
        )
    if config.lora.type != "lora":
        raise UserError(
            f"FSDP2 has not been tried with lora.type={config.lora.type}: use "
            "accelerate_configs/multi_gpu.yaml, or set lora.type=lora"
        )
    if config.model.quantization in ("int8", "fp8"):
        raise UserError(
            f"FSDP2 cannot cut weights in {config.model.quantization}: use model.quantization: "
            f"nf4 or none"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
    }
    return partial(shard_model, mesh=mesh, **options)


def shard_model(model: nn.Module, **options) -> None:
    """Cut the frozen weights of a diffusers model, block by block (FSDP2); each process keeps its
    part.

    What trains stays whole in each: `DistributedDataParallel` averages its gradients, and leaves
    the rest alone.
    """
    # nothing here writes into a view
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    trained = {p for p in model.parameters() if p.requires_grad}
    for module in (*reversed(get_blocks(model)), model):
        fully_shard(module, ignored_params=trained, **options)
    for parameter in trained:
        parameter.data = parameter.data.to(options["mesh"].device_type)


def get_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers model, which compute one after another."""
    names = model._no_split_modules
    return [module for module in model.modules() if type(module).__name__ in names]


def sharded_parameter_names(module: nn.Module, accelerator: Accelerator) -> list[str]:
    """The names of the parameters of which this process holds only a part; it prints how much."""
    sharded = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    if sharded:
        num_local = sum(p.to_local().numel() for p in sharded.values())
        num_total = sum(p.numel() for p in sharded.values())
        accelerator.print(
            f"FSDP2: each process holds {num_local / num_total:.1%} of the base's {num_total:,} "
            f"weights"
        )
    return list(sharded)
