"""What a U-Net is for: how pixels become what is shown and what is wanted, the loss between, and the picture."""

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
from .metrics import colourfulness, dice_iou, psnr, sharpness, ssim
from .sections import UNetConfig

AB = 110.0  # half the range of a and b


class Use(ABC):
    """Of pixels (B, C, H, W) uint8. `inputs`, `outputs`: channels of the network; `masks`: of the pixels that hold
    classes; `target`: how the second picture of a pair is read."""

    inputs: int
    outputs: int
    masks = 0
    target: Reader | None = None

    def __init__(self, config: UNetConfig) -> None:
        self.config, self.objective = config, config.objective
        self.inputs, self.outputs = config.data.channels, config.data.channels

    @abstractmethod
    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """What the network is shown (B, inputs, H, W), and what is wanted of it."""

    @abstractmethod
    def show(self, pixels: Tensor) -> Tensor:
        """What the network is shown (B, inputs, H, W) of pictures without a partner."""

    @abstractmethod
    def loss(self, prediction: Tensor, wanted: Tensor) -> Tensor: ...

    @abstractmethod
    def render(self, x: Tensor, prediction: Tensor) -> Tensor:
        """A picture (B, 1 or 3, H, W) in [-1, 1]."""

    @abstractmethod
    def truth(self, x: Tensor, wanted: Tensor) -> Tensor:
        """The same of what is wanted."""

    def figures(self, x: Tensor, prediction: Tensor, wanted: Tensor) -> dict[str, float]:
        made, true = self.render(x, prediction), self.truth(x, wanted)
        return {"psnr": psnr(made, true), "ssim": ssim(made, true), "sharpness": sharpness(made, true)}


class Segment(Use):
    """Cross-entropy and Dice (Milletari et al. 2016) of classes 0, 1, ...; 255 is left out."""

    masks = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.outputs = config.objective.classes

    def target(self, picture: Picture) -> Image.Image:
        return read_mask(picture, self.outputs)

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        return floats(pixels[:, :-1]), pixels[:, -1].long()

    def show(self, pixels: Tensor) -> Tensor:
        return floats(pixels)

    def loss(self, prediction: Tensor, wanted: Tensor) -> Tensor:
        known = (wanted != 255)[:, None]
        share = prediction.float().softmax(1) * known  # (B, K, H, W)
        truth = F.one_hot(wanted.where(known[:, 0], 0), self.outputs).movedim(3, 1) * known
        both, sizes = (share * truth).sum((2, 3)), (share + truth).sum((2, 3))  # (B, K)
        dice = (2 * both[:, 1:] + 1) / (sizes[:, 1:] + 1)
        entropy = F.cross_entropy(prediction, wanted, ignore_index=255, reduction="none").mean()
        return entropy + self.objective.dice_weight * (1 - dice.mean())

    def render(self, x: Tensor, prediction: Tensor) -> Tensor:
        return self.truth(x, prediction.argmax(1))

    def truth(self, x: Tensor, wanted: Tensor) -> Tensor:
        return 2 * wanted[:, None].clamp(max=self.outputs - 1) / (self.outputs - 1) - 1

    def figures(self, x: Tensor, prediction: Tensor, wanted: Tensor) -> dict[str, float]:
        return dice_iou(prediction.argmax(1), wanted, self.outputs)


class Pix2Pix(Use):
    """Absolute error; the adversary is the task's (Isola et al. 2017)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.outputs = 3

    def target(self, picture: Picture) -> Image.Image:
        return picture.decode()

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        return floats(pixels[:, :-3]), floats(pixels[:, -3:])

    def show(self, pixels: Tensor) -> Tensor:
        return floats(pixels)

    def loss(self, prediction: Tensor, wanted: Tensor) -> Tensor:
        return (prediction - wanted).abs().mean()

    def render(self, x: Tensor, prediction: Tensor) -> Tensor:
        return prediction.clamp(-1, 1)

    truth = render


class Restore(Use):
    """The squared error of what is added to a noisy or enlarged picture (Zhang et al. 2017, DnCNN)."""

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        true = floats(pixels)
        x = enlarged(true, self.objective.downscale)
        x = (x + 2 * self.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
        return x, true - x

    def show(self, pixels: Tensor) -> Tensor:
        """Noisy pictures as they are; small ones enlarged."""
        scale = self.objective.downscale
        return (
            F.interpolate(floats(pixels), scale_factor=scale, mode="bicubic").clamp(-1, 1)
            if scale > 1
            else floats(pixels)
        )

    def loss(self, prediction: Tensor, wanted: Tensor) -> Tensor:
        return (prediction - wanted).square().mean()

    def render(self, x: Tensor, prediction: Tensor) -> Tensor:
        return (x + prediction).clamp(-1, 1)

    truth = render

    def figures(self, x: Tensor, prediction: Tensor, wanted: Tensor) -> dict[str, float]:
        return super().figures(x, prediction, wanted) | {"psnr_shown": psnr(x, self.truth(x, wanted))}


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Made smaller and large again."""
    if scale == 1:
        return x
    small = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
    return F.interpolate(small, x.shape[2:], mode="bicubic")


class Colorize(Use):
    """L of CIE Lab is given and kept; a and b are regressed, or chosen from bins with rare ones heavier."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.inputs = 1
        self.outputs = len(ab_bins()) if self.objective.rebalanced else 2

    def prepare(self, train: Images, most: int = 2000) -> None:
        """Raises: UserError naming a grey picture."""
        for sample in train.samples:
            if sample.picture.grey:
                raise UserError(f"{sample.picture.name} is grey: to learn colours, every picture must be in colour")
        if self.objective.rebalanced:  # Zhang et al. 2016, equation 4 with lambda = 1/2, without the smoothing
            chosen = torch.cat(
                [nearest_bin(lab(train.take([i]))[:, 1:]).flatten() for i in range(min(most, len(train)))]
            )
            p = chosen.bincount(minlength=self.outputs) / len(chosen)
            weight = 1 / (0.5 * p + 0.5 / self.outputs)
            self.weight = weight / (p * weight).sum()

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        light, ab = lab(pixels).split([1, 2], 1)
        return light / 50 - 1, ab / AB

    def show(self, pixels: Tensor) -> Tensor:
        return lab(pixels)[:, :1] / 50 - 1

    def loss(self, prediction: Tensor, wanted: Tensor) -> Tensor:
        if not self.objective.rebalanced:
            return F.smooth_l1_loss(prediction, wanted, beta=0.1)
        return F.cross_entropy(prediction, nearest_bin(AB * wanted), self.weight)

    def colours(self, prediction: Tensor) -> Tensor:
        """a and b / AB; of bins their annealed mean (Zhang et al. 2016, equation 5, T = 0.38)."""
        if not self.objective.rebalanced:
            return prediction
        share = (prediction / 0.38).softmax(1)
        return torch.einsum("bqhw,qc->bchw", share, ab_bins().to(share)) / AB

    def render(self, x: Tensor, prediction: Tensor) -> Tensor:
        return self.truth(x, self.colours(prediction))

    def truth(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Colours that no screen shows at this L are drawn towards grey until it can."""
        from kornia.color import lab_to_rgb

        light, ab = 50 * (x + 1), AB * wanted
        low, high = torch.zeros_like(x), torch.ones_like(x)
        for _ in range(10):
            middle = (low + high) / 2
            rgb = lab_to_rgb(torch.cat([light, middle * ab], 1), clip=False)
            fits = ((rgb >= 0) & (rgb <= 1)).all(1, keepdim=True)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        whole = lab_to_rgb(torch.cat([light, ab], 1), clip=False)
        fits = ((whole > -1e-3) & (whole < 1 + 1e-3)).all(1, keepdim=True)
        return 2 * torch.where(fits, whole, lab_to_rgb(torch.cat([light, low * ab], 1))).clamp(0, 1) - 1

    def figures(self, x: Tensor, prediction: Tensor, wanted: Tensor) -> dict[str, float]:
        made, true, grey = self.render(x, prediction), self.truth(x, wanted), self.truth(x, 0 * wanted)
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


def nearest_bin(ab: Tensor) -> Tensor:
    """(B, 2, H, W) to indices (B, H, W)."""
    n, _, height, width = ab.shape
    flat = ab.movedim(1, 3).reshape(-1, 2)
    return torch.cat([torch.cdist(p, ab_bins().to(p)).argmin(1) for p in flat.split(65536)]).view(n, height, width)


def read_mask(picture: Picture, classes: int) -> Image.Image:
    """Classes as a picture of mode P, which is resized by the nearest pixel. Raises: UserError for other values."""
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            array = np.asarray(image if image.mode in ("1", "L", "P", "I", "I;16") else image.convert("RGB"))
    except Exception as error:
        raise UserError(f"{picture.name} is not a readable mask ({error}): mend or remove it") from None
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise UserError(f"{picture.name} is in colour: a mask has one channel that holds the class of each pixel")
        array = array[..., 0]
    values = np.unique(array).tolist()
    if classes == 2 and set(values) <= {0, 255}:
        array = array // 255 if array.dtype != bool else array
    elif wrong := [value for value in values if not (0 <= value < classes or value == 255)]:
        seen = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise UserError(
            f"{picture.name} has the values {seen}: with objective.classes={classes} a mask holds 0 to {classes - 1}, "
            f"255 for 'ignore'{', or 0 and 255 only' if classes == 2 else ''}. JPEG spoils masks: save them as PNG"
        )
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette([i for i in range(256) for _ in range(3)])
    return image


USES: dict[str, type[Use]] = {"segment": Segment, "colorize": Colorize, "pix2pix": Pix2Pix, "restore": Restore}
