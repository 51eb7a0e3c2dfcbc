"""Adaptive norms without their weights on the accelerator.

What such a norm's linear layer computes depends on time, guidance and prompt alone. These layers
can be a third of a transformer, and each sees one vector per sample. The times of a step are known
before the step comes, so the outputs are computed in advance, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.errors import UserError


def adaptive_norms(denoiser: nn.Module, class_names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a denoiser that are of these classes, by name."""
    modules = denoiser.named_modules()
    return {name: module for name, module in modules if type(module).__name__ in class_names}


class CachedLinear(nn.Module):
    """A linear layer whose weights stay in the CPU's memory.

    In training it returns `output`, which must be set before. Otherwise it computes on the CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        # a plain dictionary, no parameters, so that nothing moves or shards the weights
        self.cpu_weights = layer.cpu().requires_grad_(False).state_dict()
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.output
        return self.compute([x.cpu()], "cpu")[0].to(x.device)

    def compute(self, inputs: Iterable[Tensor], device: torch.device | str) -> list[Tensor]:
        """The layer's output for each of the inputs, computed on `device`."""
        weights = {}
        for name, tensor in self.cpu_weights.items():
            weights[name] = tensor.to(device, non_blocking=True)
        # one input at a time, for a product of another shape is rounded differently
        return [F.linear(x, **weights) for x in inputs]


class EarlyExitError(Exception):
    """Carries an embedding out of a forward pass that need not go on."""


class ModulationCache:
    """The adaptive norms of a denoiser, without their weights; those with LoRA stay as they are."""

    def __init__(self, denoiser: nn.Module, class_names: Sequence[str]) -> None:
        """Replace the linear layers of the norms, which are of the classes `class_names`.

        Raises: UserError when LoRA changes what the norms take as input.
        """
        if any(p.requires_grad for p in denoiser.time_text_embed.parameters()):
            raise UserError(
                "model.modulation_cache: lora.target_modules includes layers of time_text_embed, "
                "on which the adaptive norms depend: exclude them, as attention+mlp does, or set "
                "model.modulation_cache=false"
            )
        self.denoiser = denoiser
        self.layers: list[CachedLinear] = []
        self.precomputed: dict[Hashable, list[Tensor]] = {}
        for name, norm in adaptive_norms(denoiser, class_names).items():
            # LoRA has put its own class there
            if type(norm.linear) is nn.Linear:
                layer = CachedLinear(norm.linear).train(norm.training)
                denoiser.set_submodule(f"{name}.linear", layer)
                self.layers.append(layer)

    @torch.no_grad()
    def use(
        self, key: Hashable, forward: Callable, upcoming: Iterable[tuple[Hashable, tuple]]
    ) -> None:
        """Set the outputs for the micro-batch `key`, which is then forgotten.

        If they are not there yet, they are computed for all micro-batches in `upcoming`, each a key
        and the arguments of `forward`, which calls the denoiser.
        """
        if key not in self.precomputed:
            embeddings = {}
            for other_key, inputs in upcoming:
                embeddings[other_key] = self.compute_embedding(forward, *inputs)
            self.precompute(embeddings)
        for layer, output in zip(self.layers, self.precomputed.pop(key), strict=True):
            layer.output = output

    def compute_embedding(self, forward: Callable, *inputs: object) -> Tensor:
        """silu of the embedding (B, D) of time, guidance and prompt, when `forward` is called."""

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

    def precompute(self, embeddings: dict[Hashable, Tensor]) -> None:
        """Compute the outputs of all layers for the embedding (B, D) of each micro-batch."""
        device = next(iter(embeddings.values())).device
        precomputed: dict[Hashable, list[Tensor]] = {key: [] for key in embeddings}
        # layer by layer, so that the weights of only one are on the device
        for layer in self.layers:
            outputs = layer.compute(embeddings.values(), device)
            for key, output in zip(embeddings, outputs, strict=True):
                precomputed[key].append(output)
        self.precomputed = precomputed
