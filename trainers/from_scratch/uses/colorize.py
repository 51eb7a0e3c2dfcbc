"""Colors for grey pictures, in the Lab space (Zhang et al. 2016)."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.data.transfer import send
from trainers.errors import UserError
from trainers.from_scratch.image_sets import ImageSet
from trainers.from_scratch.uses.base import Use, resize
from trainers.metrics.image_quality import colorfulness, psnr, ssim

MAX_LOOKED_AT = 200  # pictures, for whether they have colours
AB_SCALE = 110.0  # half the range of Lab's a and b
# linear RGB to CIE XYZ under the white D65, and that white's XYZ
RGB_TO_XYZ = [
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
]
WHITE = [0.95047, 1.0, 1.08883]


class Colorize(Use):
    """x: L of CIE Lab, which is kept; y (B, 2, H, W): a and b / AB, regressed or chosen among
    bins."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.in_channels, self.out_channels = 1, len(ab_bins()) if self.objective.rebalanced else 2
        self.bin_weights: Tensor | None = None

    def prepare(self, train: ImageSet, test: ImageSet | None = None, limit: int = 2000) -> None:
        """The bins' weights: Zhang et al. 2016, equation 4, lambda = 1/2, from the colours of up to
        `limit` pictures, drawn by chance.

        Raises: UserError naming a grey picture, and where all of them are grey.
        """
        for sample in [*train.samples, *(test.samples if test else [])]:
            if sample.picture.is_grayscale:
                raise UserError(
                    f"{sample.picture.name} is grey: to learn colours, every picture must be in "
                    f"colour"
                )
        warn_of_gray(train, self.config.seed)
        if self.objective.rebalanced:
            rng = SampleRng(0, 0, [])
            rows = choose_rows(derive_seed(self.config.seed, "colors"), len(train), limit)
            bins = [nearest_bin(self.pair(train.take([i]), rng)[1]) for i in rows]
            p = torch.cat(bins).flatten().bincount(minlength=self.out_channels).float()
            p /= p.sum()
            weight = 1 / (p / 2 + 1 / (2 * self.out_channels))
            self.bin_weights = weight / (p * weight).sum()

    def to_input(self, pixels: Tensor) -> Tensor:
        return rgb_pixels_to_lab(pixels)[:, :1] / 50 - 1

    def pair(self, pixels: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        lightness, ab = rgb_pixels_to_lab(pixels).split([1, 2], 1)
        return lightness / 50 - 1, ab / AB_SCALE

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        if not self.objective.rebalanced:
            return F.smooth_l1_loss(prediction, y, beta=0.1)
        return F.cross_entropy(
            prediction, nearest_bin(y), self.bin_weights, reduction="none"
        ).mean()

    def postprocess(self, prediction: Tensor) -> Tensor:
        """Of bins their annealed mean (Zhang et al. 2016, equation 5, T = 0.38)."""
        if not self.objective.rebalanced:
            return prediction
        return (
            torch.einsum("bqhw,qc->bchw", (prediction / 0.38).softmax(1), ab_bins().to(prediction))
            / AB_SCALE
        )

    def render(self, pixels: Tensor, x: Tensor, prediction: Tensor) -> Tensor:
        """Its colours are the prediction's; L is the picture's own, at its own size."""
        ab = resize(self.postprocess(prediction), pixels.shape[2:])
        return self.to_image(self.to_input(pixels), ab)

    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        """Colours that no screen shows at their L are drawn towards grey until one can."""
        from kornia.color import lab_to_rgb

        scale, lightness, ab = torch.zeros_like(x), 50 * (x + 1), AB_SCALE * y
        for k in range(9):  # the largest multiple of 1/256 up to 1 that fits
            trial = scale + 2.0**-k
            rgb = lab_to_rgb(torch.cat([lightness, trial * ab], 1), clip=False)
            fits = ((rgb > -1e-3) & (rgb < 1 + 1e-3)).all(1, keepdim=True) & (trial <= 1)
            scale = torch.where(fits, trial, scale)
        return 2 * lab_to_rgb(torch.cat([lightness, scale * ab], 1)) - 1

    def metrics(self, x: Tensor, generated: Tensor, y: Tensor) -> dict[str, float]:
        generated, true, gray = (self.to_image(x, ab) for ab in (generated, y, 0 * y))
        colors = {
            "colourfulness": colorfulness(generated),
            "colourfulness_true": colorfulness(true),
        }
        return {
            "psnr": psnr(generated, true),
            "psnr_grey": psnr(gray, true),
            "ssim": ssim(generated, true),
            **colors,
        }


def warn_of_gray(images: ImageSet, seed: int) -> None:
    """Warn of pictures that are stored in colour and have none. Raises: UserError where none of
    those that were looked at has any."""
    rows = choose_rows(derive_seed(seed, "gray"), len(images), MAX_LOOKED_AT)
    gray = [row for row in rows if (images[row] == images[row][:1]).all()]
    if not gray:
        return
    found = (
        f"{len(gray)} of {len(rows)} pictures are stored in colour and have none, such as "
        f"{images.samples[gray[0]].picture.name}"
    )
    if len(gray) == len(rows):
        raise UserError(f"{found}: there is no colour to learn")
    warnings.warn(f"{found}: the model learns to give little colour", stacklevel=3)


def rgb_pixels_to_lab(pixels: Tensor) -> Tensor:
    """CIE Lab (B, 3, H, W) of RGB uint8; L in 0..100.

    kornia's `rgb_to_lab` makes its constants on the device at each call, which waits for it.
    """
    from kornia.color import rgb_to_linear_rgb

    matrix, white = (send(torch.tensor(part), pixels.device) for part in (RGB_TO_XYZ, WHITE))
    linear = rgb_to_linear_rgb(pixels.float() / 255)
    xyz = torch.einsum("oi, bihw -> bohw", matrix, linear) / white[:, None, None]
    threshold = 0.008856
    root = xyz.clamp(min=threshold).pow(1 / 3)
    x, y, z = torch.where(xyz > threshold, root, 7.787 * xyz + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@lru_cache(maxsize=1)
def ab_bins() -> Tensor:
    """(Q, 2): the points of a grid of 10 in the plane of a and b near which there is a colour of
    sRGB."""
    ramp = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.cartesian_prod(ramp, ramp, ramp).T[None, :, :, None]
    return (rgb_pixels_to_lab(cube)[0, 1:, :, 0].T / 10).round().unique(dim=0) * 10


def nearest_bin(y: Tensor) -> Tensor:
    """(B, 2, H, W) to indices (B, H, W)."""
    flat = AB_SCALE * y.movedim(1, 3).reshape(-1, 2)
    bins = send(ab_bins(), flat.device).to(flat.dtype)
    nearest = torch.cat([torch.cdist(part, bins).argmin(1) for part in flat.split(65536)])
    return nearest.view(y[:, 0].shape)
