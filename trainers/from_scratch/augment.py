"""Random changes of whole batches on the device; row i's depends on its own stream of draws
only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.config import ImagesConfig
from trainers.data.rng import SampleRng
from trainers.data.transfer import send_numbers


def augment(
    pixels: Tensor, config: ImagesConfig, rng: SampleRng, num_mask_channels: int = 0
) -> Tensor:
    """(B, C, S, S) uint8 flipped, turned and bent, all channels of a row alike; the last
    `num_mask_channels` hold classes."""
    if config.random_flip:
        pixels = torch.where(random_mask(rng), pixels.flip(-1), pixels)
    if config.random_vertical_flip:
        pixels = torch.where(random_mask(rng), pixels.flip(-2), pixels)
    if config.random_rotate:
        rotations = torch.stack([pixels.rot90(k, (-2, -1)) for k in range(4)])
        pixels = rotations[
            (4 * rng.uniform()).long(), torch.arange(len(pixels), device=pixels.device)
        ]
    return (
        elastic_deform(pixels, config.elastic, rng, num_mask_channels) if config.elastic else pixels
    )


def random_mask(rng: SampleRng) -> Tensor:
    return (rng.uniform() < 0.5)[:, None, None, None]


def elastic_deform(pixels: Tensor, sigma: float, rng: SampleRng, num_mask_channels: int) -> Tensor:
    """Displaced by a 3 x 3 grid of Gaussian vectors of `sigma` pixels, interpolated (Ronneberger et
    al. 2015, 3.1)."""
    n, channels, height, width = pixels.shape
    field = F.interpolate(
        rng.normal((n, 2, 3, 3)), (height, width), mode="bicubic", align_corners=True
    )
    grid = F.affine_grid(
        torch.eye(2, 3, device=pixels.device).expand(n, 2, 3),
        list(pixels.shape),
        align_corners=False,
    )
    size = send_numbers([width, height], pixels.device)
    grid = grid + 2 * sigma * field.permute(0, 2, 3, 1) / size
    images, classes = pixels.float().split([channels - num_mask_channels, num_mask_channels], 1)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).round()
    classes = F.grid_sample(
        classes, grid, mode="nearest", padding_mode="reflection", align_corners=False
    )
    return torch.cat([images, classes], 1).byte()


def differentiable_augment(x: Tensor, kinds: Sequence[str], rng: SampleRng) -> Tensor:
    """What a discriminator of few pictures is shown, real and made ones alike (Zhao et al. 2020); x
    in [-1, 1]."""

    def u() -> Tensor:
        return rng.uniform()[:, None, None, None]

    if "color" in kinds:
        x = x + u() - 0.5
        gray = x.mean(1, keepdim=True)
        x = gray + 2 * u() * (x - gray)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (0.5 + u()) * (x - mean)
    side = x.shape[-1]
    if "translation" in kinds:
        max_shift = side // 8
        shift = [
            torch.floor((2 * max_shift + 1) * rng.uniform()) - max_shift for _ in range(2)
        ]  # whole pixels
        affine = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
        affine[:, :, 2] = 2 / side * torch.stack(shift, 1)
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    if "cutout" in kinds:
        positions = torch.arange(side, device=x.device)
        row, column = (
            positions.view(s) - torch.floor((side + 1) * u())
            for s in ((1, 1, -1, 1), (1, 1, 1, -1))
        )
        half = side // 4
        x = torch.where((row.abs() < half) & (column.abs() < half), 0, x)
    return x
