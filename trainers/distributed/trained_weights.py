"""The weights of a module that train, by name."""

from __future__ import annotations

from torch import Tensor, nn


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and the buffers that belong to them, such as spectral norm's
    vectors."""
    trained = trainable_parameters(module)
    owners = {name.rpartition(".")[0] + "." for name in trained}
    return {
        **trained,
        **{n: b for n, b in module.named_buffers() if any(n.startswith(owner) for owner in owners)},
    }
