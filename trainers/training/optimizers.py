"""Optimisers by name, and the learning rate as a pure function of the step: nothing to prepare or
to checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from trainers.config import OptimizerConfig
from trainers.distributed.trained_weights import trainable_parameters


def make_optimizer(config: OptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimiser `config.name` over parameter `groups`, each {"params": [...], "lr": peak
    rate}."""
    lr, betas, eps, decay = config.learning_rate, config.betas, config.eps, config.weight_decay
    if config.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            groups, lr=lr, weight_decay=decay, scale_parameter=False, relative_step=False
        )
    if config.name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, safeguard_warmup=True
        )
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
        )
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    optimizer_class = AdamW8bit if config.name == "adamw_8bit" else PagedAdamW8bit
    return optimizer_class(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)


def make_lr_schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """step -> factor of the peak learning rate, for steps 0 .. `steps` - 1; the values of
    `diffusers.get_scheduler`."""
    warmup, rest = config.lr_warmup_steps, max(1, steps - config.lr_warmup_steps)

    def decay(progress: float) -> float:  # progress in [0, 1) after the warm-up
        match config.lr_scheduler:
            case "linear":
                return 1 - progress
            case "cosine":
                return (1 + math.cos(math.pi * progress)) / 2
            case "cosine_with_restarts":
                return (1 + math.cos(math.pi * (config.lr_num_cycles * progress % 1))) / 2
            case "polynomial":  # ends at 1e-7 in absolute terms
                end = min(1.0, 1e-7 / config.learning_rate) if config.learning_rate else 0.0
                return end + (1 - end) * (1 - progress) ** config.lr_power
        return 1.0

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return decay(min(1.0, (step - warmup) / rest))

    return rate


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Step by the gradient, clipped to `max_norm`, unless it is not finite: its norm, and 1 if
    skipped, else 0.

    AdamW is told both, and clips and skips in its own pass: nothing waits for the device. For the
    others the host must look. With float16 overflow is the GradScaler's business, and only the loss
    counts as skipped.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    unwrapped = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if isinstance(unwrapped, torch.optim.AdamW) and not accelerator.scaler:
        norm = get_total_norm([g for p in trained if (g := p.grad) is not None])
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


def get_total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all as one vector. Small ones are joined first: a call for each would take longer than its
    sum."""
    parts = [g for g in gradients if g.numel() >= 2**16]
    if small := [g for g in gradients if g.numel() < 2**16]:
        parts.append(_flatten_dense_tensors(small))
    return torch.stack(torch._foreach_norm(parts)).norm()


class EMA:
    """A running average of a module's trained parameters, kept beside them.

    The decay grows as min(decay, (1 + step) / (10 + step)), so that short runs are not averaged
    with their start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = trainable_parameters(module)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights; call it again to undo."""
        for name, parameter in self.trained.items():
            weight = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weight)
