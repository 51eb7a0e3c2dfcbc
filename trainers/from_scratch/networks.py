"""Small networks of the from-scratch trainers, as diffusers models: they save, load and go to the
Hub like those.

Pictures are (B, channels, S, S) in [-1, 1].
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def channel_widths(size: int, width: int) -> tuple[int, list[int]]:
    """The side of the smallest level, 4 to 7, and the channels of the levels below `size`, doubled
    at each."""
    levels = max(1, (size // 4).bit_length() - 1)
    if size % 2**levels:
        raise ValueError(f"size must be a multiple of {2**levels}, not {size}")
    return size // 2**levels, [width * 2**i for i in range(levels)]


class ConvAutoencoder(ModelMixin, ConfigMixin):
    """Strided convolutions, a linear bottleneck of `latent_dim` numbers, and the way back (Masci et
    al. 2011).

    Codes (B, latent_dim) have no fixed range. `variational`: they are the mean of a Gaussian.
    """

    @register_to_config
    def __init__(
        self, channels: int, size: int, width: int, latent_dim: int, variational: bool
    ) -> None:
        super().__init__()
        side, widths = channel_widths(size, width)
        down, up = [], []
        for a, b in pairwise([channels, *widths]):
            down += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.SiLU()]
        for a, b in pairwise([*reversed(widths), channels]):
            up += [nn.SiLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
        flat = widths[-1] * side * side
        self.encoder = nn.Sequential(
            *down, nn.Flatten(), nn.Linear(flat, (1 + variational) * latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, flat), nn.Unflatten(1, (widths[-1], side, side)), *up
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, when variational, logarithm of the variance; each (B, latent_dim)."""
        z = self.encoder(x)
        return tuple(z.chunk(2, 1)) if self.config.variational else (z, None)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The picture that comes out, and the posterior; eps (B, latent_dim): where in it the code
        is drawn."""
        mean, logvar = self.posterior(x)
        return self.decode(mean if eps is None else mean + (logvar / 2).exp() * eps), mean, logvar


class ResidualBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut (He et al. 2016), at the resolution that
    `resample` gives."""

    def __init__(self, a: int, b: int, resample: nn.Module, use_norm: bool = True) -> None:
        super().__init__()
        norms = (
            (nn.GroupNorm(8, a), nn.GroupNorm(8, b)) if use_norm else (nn.Identity(), nn.Identity())
        )
        first, second = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        act = nn.LeakyReLU(0.2)
        upsamples = isinstance(resample, nn.Upsample)
        inner = (
            [resample, first, norms[1], act, second]
            if upsamples
            else [first, norms[1], act, second, resample]
        )
        self.residual = nn.Sequential(norms[0], act, *inner)
        shape = nn.Conv2d(a, b, 1, bias=False) if a != b else nn.Identity()
        self.shortcut = (
            nn.Sequential(resample, shape) if not upsamples else nn.Sequential(shape, resample)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)) / 2**0.5


class Generator(ModelMixin, ConfigMixin):
    """z (B, latent_dim), and classes (B,) if any, to pictures (Radford et al. 2016; Gulrajani et
    al. 2017)."""

    @register_to_config
    def __init__(
        self, architecture: str, channels: int, size: int, width: int, latent_dim: int, classes: int
    ) -> None:
        super().__init__()
        side, widths = channel_widths(size, width)
        self.embed = nn.Embedding(classes, latent_dim) if classes else None
        layers = [nn.Linear(latent_dim * (2 if classes else 1), widths[-1] * side * side)]
        layers += [nn.Unflatten(1, (widths[-1], side, side))]
        if architecture == "dcgan":
            for a, b in pairwise([*reversed(widths), channels]):
                layers += [
                    nn.GroupNorm(8, a),
                    nn.LeakyReLU(0.2),
                    nn.ConvTranspose2d(a, b, 4, stride=2, padding=1),
                ]
        else:
            for a, b in pairwise([*reversed(widths), width]):
                layers += [ResidualBlock(a, b, nn.Upsample(scale_factor=2))]
            layers += [
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, channels, 3, padding=1),
            ]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        z = z if self.embed is None else torch.cat([z, self.embed(label)], 1)
        return self.layers(z)


class Discriminator(ModelMixin, ConfigMixin):
    """Pictures to scores (B,); with classes (B,) by projection (Miyato and Koyama 2018)."""

    @register_to_config
    def __init__(
        self, architecture: str, channels: int, size: int, width: int, classes: int, spectral: bool
    ) -> None:
        super().__init__()
        side, widths = channel_widths(size, width)
        layers = []
        if architecture == "dcgan":
            for a, b in pairwise([channels, *widths]):
                layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1)]
            for a, b in pairwise([width, *widths]):
                layers += [ResidualBlock(a, b, nn.AvgPool2d(2), use_norm=False)]
            layers += [nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.score = nn.Linear(widths[-1] * side * side, 1)
        self.embed = nn.Embedding(classes, widths[-1] * side * side) if classes else None
        if self.embed is not None:
            nn.init.normal_(
                self.embed.weight, std=self.embed.embedding_dim**-0.5
            )  # weighs as much as the score
        if spectral:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                    spectral_norm(module)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.features(x)
        score = self.score(h).squeeze(1)
        return score if self.embed is None else score + (self.embed(label) * h).sum(1)


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """What was given and what came out, one above the other, to a score for each patch (Isola et
    al. 2017)."""

    @register_to_config
    def __init__(self, channels: int = 6, width: int = 32) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        layers = [nn.Conv2d(widths[0], widths[1], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for a, b in pairwise(widths[1:]):
            layers += [
                nn.Conv2d(a, b, 4, stride=2, padding=1),
                nn.GroupNorm(8, b),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


class UNet(ModelMixin, ConfigMixin):
    """Down and up again, each level beside its like (Ronneberger et al. 2015).

    Sides are multiples of patch_size 2^(levels - 1). patch_size: patches of so many pixels are one
    place of the first level, which saves its square in time.
    """

    @register_to_config
    def __init__(
        self, in_channels: int, out_channels: int, width: int, levels: int, patch_size: int = 1
    ) -> None:
        super().__init__()
        area = patch_size**2
        widths = [width * 2**i for i in range(levels)]

        def double_conv(a: int, b: int) -> nn.Sequential:
            layers = [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            return nn.Sequential(
                *layers, nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()
            )

        self.down = nn.ModuleList(
            double_conv(a, b) for a, b in pairwise([area * in_channels, *widths])
        )
        steps = list(pairwise(reversed(widths)))
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2)) for a, b in steps
        )
        self.up = nn.ModuleList(double_conv(2 * b, b) for _, b in steps)
        self.out = nn.Conv2d(width, area * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = F.pixel_unshuffle(x, self.config.patch_size), []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat([skips.pop(), enlarge(x)], 1))
        return F.pixel_shuffle(self.out(x), self.config.patch_size)


class Classifier(ModelMixin, ConfigMixin):
    """A reader of a data set's own classes; its last features stand in for Inception's where that
    knows nothing."""

    @register_to_config
    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        layers = []
        for a, b in pairwise([channels, width, 2 * width, 4 * width]):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.read = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.read(self.layers(x))
