"""Weights of adaptive norms kept out of the accelerator: what they give depends on time, guidance and prompt alone.

In SD3.5 and Flux.1 these linear layers are 28 to 35 % of the transformer, and each sees one vector per sample. Times
are known before their step comes, so the outputs are computed ahead, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
import torch.nn.functional as F
from diffusers.models import normalization
from torch import Tensor, nn

from trainers.errors import UserError

ADAPTIVE = (
    normalization.AdaLayerNormZero,
    normalization.AdaLayerNormZeroSingle,
    normalization.AdaLayerNormContinuous,
    normalization.SD35AdaLayerNormZeroX,
)


class Recalled(nn.Module):
    """A linear layer whose weights wait in the CPU's memory. In training it gives `now`; else it computes there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.away = layer.cpu().requires_grad_(False).state_dict()  # no parameters, so nothing moves or cuts them
        self.now: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.now if self.training else self.compute([x.cpu()], "cpu")[0].to(x.device)

    def compute(self, inputs: Iterable[Tensor], device: torch.device | str) -> list[Tensor]:
        """What the layer gives for each input, one at a time: other shapes would round otherwise."""
        there = {name: tensor.to(device, non_blocking=True) for name, tensor in self.away.items()}
        return [F.linear(x, **there) for x in inputs]


class EmbeddedError(Exception):
    """Carries the embedding of time, guidance and prompt out of a forward pass that need not go on."""


class Modulation:
    """The adaptive norms of a denoiser, without their weights; those that LoRA changes stay."""

    def __init__(self, denoiser: nn.Module) -> None:
        """Raises: UserError when LoRA changes what they are given."""
        if any(p.requires_grad for p in denoiser.time_text_embed.parameters()):
            raise UserError(
                "model.modulation_cache: lora.target_modules has layers of time_text_embed, on which adaptive norms "
                "depend: leave them out, as attention+mlp does, or drop the cache"
            )
        self.denoiser, self.layers = denoiser, []
        self.ahead: dict[Hashable, list[Tensor]] = {}
        for name, norm in list(denoiser.named_modules()):
            if isinstance(norm, ADAPTIVE) and type(norm.linear) is nn.Linear:
                self.layers.append(Recalled(norm.linear).train(norm.training))
                denoiser.set_submodule(f"{name}.linear", self.layers[-1])

    @torch.no_grad()
    def embedding(self, forward, *inputs) -> Tensor:
        """silu of what the denoiser embeds (B, D) when `forward` is called with the inputs."""

        def leave(module: nn.Module, given: object, output: Tensor) -> None:
            raise EmbeddedError(output)

        hook = self.denoiser.time_text_embed.register_forward_hook(leave)
        try:
            forward(*inputs)
        except EmbeddedError as found:
            return F.silu(found.args[0])
        finally:
            hook.remove()
        raise RuntimeError("the denoiser embedded no time")

    @torch.no_grad()
    def refill(self, embeddings: dict[Hashable, Tensor]) -> None:
        """Compute ahead for micro-batches by their key."""
        device, ahead = next(iter(embeddings.values())).device, {key: [] for key in embeddings}
        for layer in self.layers:
            for outcome, output in zip(ahead.values(), layer.compute(embeddings.values(), device), strict=True):
                outcome.append(output)
        self.ahead = ahead

    def recall(self, key: Hashable) -> None:
        for layer, output in zip(self.layers, self.ahead.pop(key), strict=True):
            layer.now = output
