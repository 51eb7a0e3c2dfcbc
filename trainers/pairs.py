"""What a U-Net is for: how pixels become what is shown and what is wanted, the loss between them, and the picture."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import UserError
from .data import Picture
from .draws import Draws
from .images import Images, Reader, floats
from .metrics import colourfulness, confusion, psnr, sharpness, ssim
from .sections import UNetConfig

AB = 110.0  # half the range of Lab's a and b
IGNORED = 255  # in a mask


class Use(ABC):
    """Pixels are (B, C, H, W) uint8, the target's channels last; what is shown x and made y are in [-1, 1].

    target: how the second picture of a pair is read; masks: how many of its channels hold classes; noise: how many of
    the last channels of x are noise; inputs, outputs: channels of the network.
    """

    target: Reader | None = None
    masks = noise = 0

    def __init__(self, config: UNetConfig) -> None:
        self.config, self.objective = config, config.objective
        self.inputs = self.outputs = config.data.channels

    def show(self, pixels: Tensor) -> Tensor:
        """(B, inputs, H, W) of a picture without its target."""
        return floats(pixels)

    @abstractmethod
    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """x and the wanted y."""

    @abstractmethod
    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Of the network's output (B, outputs, H, W)."""

    def decide(self, prediction: Tensor) -> Tensor:
        """The network's output as a y."""
        return prediction

    @abstractmethod
    def render(self, x: Tensor, y: Tensor) -> Tensor:
        """A picture (B, 1 or 3, H, W) in [-1, 1]."""

    def figures(self, x: Tensor, made: Tensor, y: Tensor) -> dict[str, float]:
        """made, y: what was decided and what is wanted."""
        made, true = self.render(x, made), self.render(x, y)
        return {"psnr": psnr(made, true), "ssim": ssim(made, true), "sharpness": sharpness(made, true)}


class Segment(Use):
    """y (B, H, W): classes. Cross-entropy and soft Dice (Milletari et al. 2016), the mean over classes."""

    masks = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.outputs = config.objective.classes

    def target(self, picture: Picture) -> Image.Image:
        return read_mask(picture, self.outputs)

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        return floats(pixels[:, :-1]), pixels[:, -1].long()

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        known = y != IGNORED
        truth = F.one_hot(y.where(known, 0), self.outputs).movedim(3, 1) * known[:, None]  # (B, K, H, W)
        share = prediction.float().softmax(1) * known[:, None]
        dice = (2 * (share * truth).sum((2, 3)) + 1) / ((share + truth).sum((2, 3)) + 1)
        entropy = F.cross_entropy(prediction, y, ignore_index=IGNORED, reduction="none").mean()
        return entropy + self.objective.dice_weight * (1 - dice.mean())

    def decide(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def render(self, x: Tensor, y: Tensor) -> Tensor:
        top = self.outputs - 1
        return 2 * y[:, None].clamp(max=top) / top - 1

    def figures(self, x: Tensor, made: Tensor, y: Tensor) -> dict[str, float]:
        return confusion(made, y, self.outputs, IGNORED)


class Pix2Pix(Use):
    """y (B, 3, H, W): the target. Absolute error; the adversary is the task's (Isola et al. 2017).

    Noise is what grain is made of.
    """

    noise = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.inputs, self.outputs = config.data.channels + self.noise, 3

    def target(self, picture: Picture) -> Image.Image:
        return picture.decode()

    def show(self, pixels: Tensor) -> Tensor:
        return self.grained(pixels, Draws(self.config.seed, -1, range(len(pixels)), pixels.device))

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        return self.grained(pixels[:, :-3], rng), floats(pixels[:, -3:])

    def grained(self, pixels: Tensor, rng: Draws) -> Tensor:
        return torch.cat([floats(pixels), rng.normal(pixels[:, :1].shape)], 1)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).abs().mean()

    def render(self, x: Tensor, y: Tensor) -> Tensor:
        return y.clamp(-1, 1)


class Restore(Use):
    """y (B, C, H, W): what is added to a noisy or enlarged picture; its squared error (Zhang et al. 2017, DnCNN)."""

    def show(self, pixels: Tensor) -> Tensor:
        """Noisy pictures as they are; small ones enlarged."""
        x, scale = floats(pixels), self.objective.downscale
        return F.interpolate(x, scale_factor=scale, mode="bicubic").clamp(-1, 1) if scale > 1 else x

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        true, scale = floats(pixels), self.objective.downscale
        x = true
        if scale > 1:
            x = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
            x = F.interpolate(x, true.shape[2:], mode="bicubic")
        x = (x + 2 * self.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
        return x, true - x

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).square().mean()

    def render(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).clamp(-1, 1)

    def figures(self, x: Tensor, made: Tensor, y: Tensor) -> dict[str, float]:
        return super().figures(x, made, y) | {"psnr_shown": psnr(x, self.render(x, y))}


class Colorize(Use):
    """x: L of CIE Lab, which is kept; y (B, 2, H, W): a and b / AB, regressed or chosen among bins."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.inputs, self.outputs = 1, len(ab_bins()) if self.objective.rebalanced else 2
        self.weight: Tensor | None = None

    def prepare(self, train: Images, test: Images | None = None, most: int = 2000) -> None:
        """The bins' weights: Zhang et al. 2016, equation 4, lambda = 1/2, from the colours of up to `most` pictures.

        Raises: UserError naming a grey picture.
        """
        for sample in [*train.samples, *(test.samples if test else [])]:
            if sample.picture.grey:
                raise UserError(f"{sample.picture.name} is grey: to learn colours, every picture must be in colour")
        if self.objective.rebalanced:
            rng = Draws(0, 0, [])
            chosen = [nearest_bin(self.pair(train.take([i]), rng)[1]) for i in range(min(most, len(train)))]
            p = torch.cat(chosen).flatten().bincount(minlength=self.outputs).float()
            p /= p.sum()
            weight = 1 / (p / 2 + 1 / (2 * self.outputs))
            self.weight = weight / (p * weight).sum()

    def show(self, pixels: Tensor) -> Tensor:
        return lab(pixels)[:, :1] / 50 - 1

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        light, ab = lab(pixels).split([1, 2], 1)
        return light / 50 - 1, ab / AB

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        if not self.objective.rebalanced:
            return F.smooth_l1_loss(prediction, y, beta=0.1)
        return F.cross_entropy(prediction, nearest_bin(y), self.weight, reduction="none").mean()

    def decide(self, prediction: Tensor) -> Tensor:
        """Of bins their annealed mean (Zhang et al. 2016, equation 5, T = 0.38)."""
        if not self.objective.rebalanced:
            return prediction
        return torch.einsum("bqhw,qc->bchw", (prediction / 0.38).softmax(1), ab_bins().to(prediction)) / AB

    def render(self, x: Tensor, y: Tensor) -> Tensor:
        """Colours that no screen shows at their L are drawn towards grey until one can."""
        from kornia.color import lab_to_rgb

        scale, light, ab = torch.zeros_like(x), 50 * (x + 1), AB * y
        for k in range(9):  # the largest multiple of 1/256 up to 1 that fits
            trial = scale + 2.0**-k
            rgb = lab_to_rgb(torch.cat([light, trial * ab], 1), clip=False)
            fits = ((rgb > -1e-3) & (rgb < 1 + 1e-3)).all(1, keepdim=True) & (trial <= 1)
            scale = torch.where(fits, trial, scale)
        return 2 * lab_to_rgb(torch.cat([light, scale * ab], 1)) - 1

    def figures(self, x: Tensor, made: Tensor, y: Tensor) -> dict[str, float]:
        made, true, grey = (self.render(x, ab) for ab in (made, y, 0 * y))
        colours = {"colourfulness": colourfulness(made), "colourfulness_true": colourfulness(true)}
        return {"psnr": psnr(made, true), "psnr_grey": psnr(grey, true), "ssim": ssim(made, true), **colours}


def lab(pixels: Tensor) -> Tensor:
    """CIE Lab (B, 3, H, W) of RGB uint8; L in 0..100."""
    from kornia.color import rgb_to_lab

    return rgb_to_lab(pixels.float() / 255)


@lru_cache(maxsize=1)
def ab_bins() -> Tensor:
    """(Q, 2): the points of a grid of 10 in the plane of a and b near which there is a colour of sRGB."""
    ramp = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.cartesian_prod(ramp, ramp, ramp).T[None, :, :, None]
    return (lab(cube)[0, 1:, :, 0].T / 10).round().unique(dim=0) * 10


def nearest_bin(y: Tensor) -> Tensor:
    """(B, 2, H, W) to indices (B, H, W)."""
    flat = AB * y.movedim(1, 3).reshape(-1, 2)
    nearest = torch.cat([torch.cdist(part, ab_bins().to(part)).argmin(1) for part in flat.split(65536)])
    return nearest.view(y[:, 0].shape)


def read_mask(picture: Picture, classes: int) -> Image.Image:
    """Classes as a picture of mode P, which is resized by the nearest pixel. Raises: UserError for other values."""
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            array = np.asarray(image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserError(f"{picture.name} is not a readable mask ({error}): mend or remove it") from None
    channels = array.reshape(*array.shape[:2], -1)
    channels = channels[..., :1] if channels.shape[2] == 2 else channels[..., :3]  # without alpha
    if (channels != channels[..., :1]).any():
        raise UserError(f"{picture.name} is in colour: a mask has one channel, which holds the class of each pixel")
    array = channels[..., 0].astype(int)
    values = np.unique(array).tolist()
    if classes == 2 and set(values) <= {0, 255}:
        array = array // 255
    elif wrong := [v for v in values if not 0 <= v < classes and (v != IGNORED or classes == 2)]:
        seen = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        wanted = "0 and 1, or 0 and 255" if classes == 2 else f"0 to {classes - 1}, and {IGNORED} for 'ignore'"
        raise UserError(
            f"{picture.name} has the values {seen}: with objective.classes={classes} a mask holds {wanted}. "
            "JPEG spoils masks: save them as PNG"
        )
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette([level for level in range(256) for _ in range(3)])
    return image


USES: dict[str, type[Use]] = {"segment": Segment, "colorize": Colorize, "pix2pix": Pix2Pix, "restore": Restore}
