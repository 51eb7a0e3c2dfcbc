"""Optimizers by name, and the learning rate as a pure function of the step.

The rate is nothing to prepare or to checkpoint. A new optimizer or schedule is a row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainers.config import OptimizerConfig
from trainers.config.base_sections import OPTIMIZER_KEYS
from trainers.errors import UserError


@dataclass(frozen=True)
class OptimizerEntry:
    """Where an optimizer's class is, and its own options."""

    module: str  # imported only when the optimizer is used
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": OptimizerEntry("torch.optim", "AdamW", options={"fused": True}),
    "adamw_8bit": OptimizerEntry("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": OptimizerEntry("bitsandbytes.optim", "PagedAdamW8bit"),
    "adafactor": OptimizerEntry(
        "transformers.optimization",
        "Adafactor",
        # so that the rate of the config is the rate
        options={"scale_parameter": False, "relative_step": False},
    ),
    "prodigy": OptimizerEntry("prodigyopt", "Prodigy", options={"safeguard_warmup": True}),
    "lion": OptimizerEntry("lion_pytorch", "Lion"),
    "came": OptimizerEntry("came_pytorch", "CAME"),
    # its rates are then those of AdamW (Liu et al. 2025)
    "muon": OptimizerEntry("torch.optim", "Muon", options={"adjust_lr_fn": "match_rms_adamw"}),
    "schedule_free": OptimizerEntry("schedulefree", "AdamWScheduleFree"),
    "prodigy_schedule_free": OptimizerEntry("prodigyplus", "ProdigyPlusScheduleFree"),
}


def find_optimizer(name: str) -> OptimizerEntry:
    """The row of the table, or the class that a name package.Class is of."""
    module, _, class_name = name.rpartition(".")
    return OPTIMIZERS.get(name) or OptimizerEntry(module, class_name)


def make_optimizer(config: OptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer `config.name` over `groups`, each {"params": [...], "lr": peak rate}.

    Raises: UserError for a class that is none, and for parameters or arguments that it refuses.
    """
    entry = find_optimizer(config.name)
    settings = {key: getattr(config, key) for key in OPTIMIZER_KEYS.get(config.name, ())}
    settings |= {**entry.options, **config.arguments}
    try:
        optimizer_class = getattr(import_module(entry.module), entry.class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optimizer.name: {config.name} cannot be imported: {error}") from None
    is_known = config.name in OPTIMIZERS
    # before it is called, for it may be anything
    if not is_known and not is_optimizer(optimizer_class):
        raise UserError(f"optimizer.name: {config.name} is no optimizer of PyTorch")
    try:
        return optimizer_class(groups, lr=config.learning_rate, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in config.arguments.items())
        where = f" with optimizer.arguments {given}" if given else ""
        raise UserError(f"optimizer.name: {config.name} refuses this{where}: {error}") from error


def is_optimizer(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)


def try_optimizer(config: OptimizerConfig) -> None:
    """Make it once for a small matrix, before anything is loaded. Raises: UserError."""
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": config.learning_rate}]
    make_optimizer(config, groups)


def polynomial(progress: float, config: OptimizerConfig) -> float:
    """Ends at 1e-7 in absolute terms, as the scheduler of diffusers."""
    end = min(1.0, 1e-7 / config.learning_rate) if config.learning_rate else 0.0
    return end + (1 - end) * (1 - progress) ** config.lr_power


def restarted_cosine(progress: float, config: OptimizerConfig) -> float:
    return (1 + math.cos(math.pi * (config.lr_num_cycles * progress % 1))) / 2


# the factor of the peak rate at a progress in [0, 1) after the warm-up
LR_SCHEDULES: dict[str, Callable[[float, OptimizerConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "constant_with_warmup": lambda progress, config: 1.0,
    "linear": lambda progress, config: 1 - progress,
    "cosine": lambda progress, config: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_with_restarts": restarted_cosine,
    "polynomial": polynomial,
}


def make_lr_schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """A function from step to the factor of the peak learning rate, for 0 .. `steps` - 1.

    Its values are those of `diffusers.get_scheduler`.
    """
    warmup, rest = config.lr_warmup_steps, max(1, steps - config.lr_warmup_steps)
    decay = LR_SCHEDULES[config.lr_scheduler]

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return decay(min(1.0, (step - warmup) / rest), config)

    return rate


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what accelerate put around it."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Step by the gradient, clipped to `max_norm`, unless it is not finite.

    Returns the norm, and 1 if the step was skipped, else 0. Fused AdamW is given both, and clips
    and skips in its own pass, so that nothing waits for the device; with the others the host must
    look. With float16 overflow is the GradScaler's business, and only the loss counts as skipped.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    unwrapped = unwrap(optimizer)
    is_fused = isinstance(unwrapped, torch.optim.AdamW) and unwrapped.defaults["fused"]
    if is_fused and not accelerator.scaler:
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        skipped = (~norm.isfinite()).float()
        unwrapped.grad_scale, unwrapped.found_inf = (norm / max_norm).clamp(min=1), skipped
        optimizer.step()
    else:
        norm = torch.as_tensor(
            accelerator.clip_grad_norm_(trained, max_norm), device=accelerator.device
        )
        skipped = (~(loss if accelerator.scaler else norm).isfinite()).float()
        if accelerator.scaler or not skipped:
            optimizer.step()
    for parameter in trained:
        parameter.grad = None
    return norm, skipped
