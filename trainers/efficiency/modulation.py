"""Adaptive norms without their weights on the accelerator.

What such a norm's linear layer computes depends on time, guidance and prompt alone. These layers
can be a third of a transformer, and each sees one vector per sample. The times of a step are known
before the step comes, so the outputs are computed in advance, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.errors import UserError


def adaptive_norms(denoiser: nn.Module, class_names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a denoiser that are of these classes, by name."""
    modules = denoiser.named_modules()
    return {name: module for name, module in modules if type(module).__name__ in class_names}


class WeightRing:
    """Layers' weights in the CPU's memory, of which two at a time are on the device.

    Who takes one layer's finds the next one's on their way, while the device computes. After the
    last layer the first one is next, as in a pipeline that samples.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        is_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if is_cuda else None
        self.cpu_weights: list[dict[str, Tensor]] = []
        # the layers that are there, each with the event of its arrival
        self.on_device: dict[int, tuple[dict[str, Tensor], torch.cuda.Event | None]] = {}

    def add(self, weights: dict[str, Tensor]) -> int:
        """The number of a layer whose weights are kept from now on."""
        if self.stream:  # only pinned memory is copied while the device computes
            weights = {name: tensor.pin_memory() for name, tensor in weights.items()}
        self.cpu_weights.append(weights)
        return len(self.cpu_weights) - 1

    def take(self, number: int) -> dict[str, Tensor]:
        """The weights of a layer on the device, for what is computed next."""
        following = (number + 1) % len(self.cpu_weights)
        for other in self.on_device.keys() - {number, following}:
            del self.on_device[other]
        current_stream = torch.cuda.current_stream(self.device) if self.stream else None
        # what comes next may lie where the others were, and so must wait until they have computed
        if current_stream:
            self.stream.wait_stream(current_stream)
        for needed in (number, following):
            if needed not in self.on_device:
                self.on_device[needed] = self.bring(needed)
        weights, arrival = self.on_device[number]
        if current_stream:
            current_stream.wait_event(arrival)
        return weights

    def bring(self, number: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        weights = self.cpu_weights[number]
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            copies = {n: w.to(self.device, non_blocking=True) for n, w in weights.items()}
        return copies, self.stream.record_event() if self.stream else None

    def clear(self) -> None:
        """Leave nothing on the device."""
        self.on_device.clear()


class CachedLinear(nn.Module):
    """A linear layer whose weights stay in the CPU's memory.

    In training it returns `output`, which must be set before. Otherwise it computes.
    """

    def __init__(self, layer: nn.Linear, ring: WeightRing) -> None:
        super().__init__()
        # no parameters, so that nothing moves or shards the weights
        self.number = ring.add(layer.cpu().requires_grad_(False).state_dict())
        self.ring, self.output = ring, None

    def forward(self, x: Tensor) -> Tensor:
        return self.output if self.training else self.compute([x])[0]

    def compute(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """The layer's output for each of the inputs."""
        weights = self.ring.take(self.number)
        # one input at a time, for a product of another shape is rounded differently
        return [F.linear(x, **weights) for x in inputs]


class EarlyExitError(Exception):
    """Carries an embedding out of a forward pass that need not go on."""


class ModulationCache:
    """The adaptive norms of a denoiser, without their weights; those with LoRA stay as they are."""

    def __init__(
        self, denoiser: nn.Module, class_names: Sequence[str], device: torch.device | str
    ) -> None:
        """Replace the linear layers of the norms, which are of the classes `class_names`.

        device: where the denoiser will compute.
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
        self.ring = WeightRing(device)
        self.precomputed: dict[Hashable, list[Tensor]] = {}
        for name, norm in adaptive_norms(denoiser, class_names).items():
            # LoRA has put its own class there
            if type(norm.linear) is nn.Linear:
                layer = CachedLinear(norm.linear, self.ring).train(norm.training)
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
        # samples that were made since may have left some
        self.ring.clear()
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
        precomputed: dict[Hashable, list[Tensor]] = {key: [] for key in embeddings}
        # layer by layer, so that the weights of only two are on the device
        for layer in self.layers:
            outputs = layer.compute(embeddings.values())
            for key, output in zip(embeddings, outputs, strict=True):
                precomputed[key].append(output)
        self.precomputed = precomputed
