"""Small networks of the from-scratch trainers, as diffusers models: they save, load and go to the Hub like those."""

from __future__ import annotations

import math
from itertools import pairwise

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ConvAutoencoder(ModelMixin, ConfigMixin):
    """Strided convolutions down to 4 to 7 pixels, a linear bottleneck of `latent_dim` numbers, and the way back.

    Masci et al. 2011. Pictures are (B, channels, size, size) in [-1, 1]; codes (B, latent_dim) have no fixed range.
    """

    @register_to_config
    def __init__(self, channels: int = 1, size: int = 28, width: int = 32, latent_dim: int = 32) -> None:
        super().__init__()
        levels = max(1, int(math.log2(size / 4)))
        if size % 2**levels:
            raise ValueError(f"size must be a multiple of {2**levels}, not {size}")
        widths, side = [width * 2**i for i in range(levels)], size // 2**levels
        down, up = [nn.Conv2d(channels, width, 3, padding=1)], []
        for a, b in pairwise([width, *widths]):
            down += [nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 4, stride=2, padding=1)]
        for a, b in pairwise([*reversed(widths), width]):
            up += [nn.GroupNorm(8, a), nn.SiLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
        flat = widths[-1] * side * side
        self.encoder = nn.Sequential(
            *down, nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Flatten(), nn.Linear(flat, latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, flat),
            nn.Unflatten(1, (widths[-1], side, side)),
            *up,
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
