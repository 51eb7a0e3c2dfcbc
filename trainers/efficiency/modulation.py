"""Weights of adaptive norms kept out of the accelerator: what they give depends on time, guidance
and prompt alone.

In SD3.5 and Flux.1 these linear layers are 28 to 35 % of the transformer, and each sees one vector
per sample. Times are known before their step comes, so the outputs are computed ahead, a layer at a
time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.errors import UserError


def adaptive_norms(denoiser: nn.Module, class_names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a denoiser that are of these classes, by name."""
    modules = denoiser.named_modules()
    return {name: module for name, module in modules if type(module).__name__ in class_names}


class CachedLinear(nn.Module):
    """A linear layer whose weights wait in the CPU's memory. In training it gives `output`; else it
    computes there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        # no parameters, so nothing moves or cuts them
        self.cpu_weights = layer.cpu().requires_grad_(False).state_dict()
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.output if self.training else self.compute([x.cpu()], "cpu")[0].to(x.device)

    def compute(self, inputs: Iterable[Tensor], device: torch.device | str) -> list[Tensor]:
        """What the layer gives for each input, one at a time: other shapes would round
        otherwise."""
        weights = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self.cpu_weights.items()
        }
        return [F.linear(x, **weights) for x in inputs]


class EarlyExitError(Exception):
    """Carries the embedding of time, guidance and prompt out of a forward pass that need not go
    on."""


class ModulationCache:
    """The adaptive norms of a denoiser, without their weights; those that LoRA changes stay."""

    def __init__(self, denoiser: nn.Module, class_names: Sequence[str]) -> None:
        """class_names: of the norms. Raises: UserError when LoRA changes what they are given."""
        if any(p.requires_grad for p in denoiser.time_text_embed.parameters()):
            raise UserError(
                "model.modulation_cache: lora.target_modules has layers of time_text_embed, on "
                "which adaptive norms depend: leave them out, as attention+mlp does, or drop the "
                "cache"
            )
        self.denoiser, self.layers = denoiser, []
        self.precomputed: dict[Hashable, list[Tensor]] = {}
        for name, norm in adaptive_norms(denoiser, class_names).items():
            if type(norm.linear) is nn.Linear:
                self.layers.append(CachedLinear(norm.linear).train(norm.training))
                denoiser.set_submodule(f"{name}.linear", self.layers[-1])

    @torch.no_grad()
    def compute_embedding(self, forward, *inputs) -> Tensor:
        """silu of what the denoiser embeds (B, D) when `forward` is called with the inputs."""

        def stop_forward(module: nn.Module, args: object, output: Tensor) -> None:
            raise EarlyExitError(output)

        hook = self.denoiser.time_text_embed.register_forward_hook(stop_forward)
        try:
            forward(*inputs)
        except EarlyExitError as stop:
            return F.silu(stop.args[0])
        finally:
            hook.remove()
        raise RuntimeError("the denoiser embedded no time")

    @torch.no_grad()
    def precompute(self, embeddings: dict[Hashable, Tensor]) -> None:
        """Compute ahead for micro-batches by their key."""
        device, precomputed = (
            next(iter(embeddings.values())).device,
            {key: [] for key in embeddings},
        )
        for layer in self.layers:
            for outputs, output in zip(
                precomputed.values(), layer.compute(embeddings.values(), device), strict=True
            ):
                outputs.append(output)
        self.precomputed = precomputed

    def use_precomputed(self, key: Hashable) -> None:
        for layer, output in zip(self.layers, self.precomputed.pop(key), strict=True):
            layer.output = output
