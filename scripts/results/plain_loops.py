"""Plain PyTorch loops of the small trainers' maths, with their data sets, as tutorials write them.

Each loop takes a config, a loader and a number of steps, and gives the loss of each step.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import cycle_loader
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainers.config import ScratchConfig
from trainers.from_scratch.networks import ConvAutoencoder, Discriminator, Generator, UNet
from trainers.from_scratch.uses import USES

Loop = Callable[[ScratchConfig, DataLoader, int], list[Tensor]]

ENDLESS = 10000  # pictures of an epoch that outlasts the measurement


def to_tensor(image: Image.Image) -> Tensor:
    """What torchvision's ToTensor and Normalize(0.5, 0.5) do."""
    array = np.array(image)
    x = torch.from_numpy(array).view(*array.shape[:2], -1)
    x = x.permute(2, 0, 1).contiguous().float().div(255)
    return x.sub_(0.5).div_(0.5)


def open_pair(path: Path) -> Tensor:
    """A picture and its mask as channels (2, H, W)."""
    mask = path.with_name(path.name.replace("_image", "_mask"))
    return torch.cat([to_tensor(Image.open(file)) for file in (path, mask)])


def augment_pair(pair: Tensor, side: int = 256, sigma: float = 8) -> Tensor:
    """A crop, flipped, turned and bent by a 3 x 3 grid, as tutorials do it with SciPy."""
    top, left = (int(torch.randint(length - side + 1, ())) for length in pair.shape[1:])
    pair = pair[:, top : top + side, left : left + side]
    for axis in (1, 2):
        pair = pair.flip(axis) if torch.rand(()) < 0.5 else pair
    pair = pair.rot90(int(torch.randint(4, ())), (1, 2))
    shifts = [ndimage.zoom(sigma * torch.randn(3, 3).numpy(), side / 3, order=3) for _ in range(2)]
    grid = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    at = np.stack(grid) + np.stack(shifts)
    picture, mask = pair.numpy()
    # a mask has no values between its own
    bent = [
        ndimage.map_coordinates(picture, at, order=1, mode="reflect"),
        ndimage.map_coordinates(mask, at, order=0, mode="reflect"),
    ]
    return torch.from_numpy(np.stack(bent))


class Rows(Dataset):
    """The pictures of a `datasets` data set, decoded each time."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return to_tensor(self.rows[i]["image"])

    def in_memory(self) -> Dataset:
        count = min(6000, len(self.rows))
        return DecodedRows([np.array(self.rows[i]["image"]) for i in range(count)])


class DecodedRows(Dataset):
    """The same, decoded beforehand; they become pictures again, as in torchvision's MNIST."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> Tensor:
        return to_tensor(Image.fromarray(self.arrays[i]))


class Pairs(Dataset):
    """Pictures with masks, opened each time; the same changes as ours, one pair at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*_image.png"))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Tensor:
        return augment_pair(open_pair(self.files[i % len(self.files)]))

    def in_memory(self) -> Dataset:
        return DecodedPairs([open_pair(path) for path in self.files])


class DecodedPairs(Dataset):
    """The same, decoded beforehand."""

    def __init__(self, pairs: list[Tensor]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Tensor:
        return augment_pair(self.pairs[i % len(self.pairs)])


def clip(model: nn.Module, config: ScratchConfig) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)


def autoencoder(config: ScratchConfig, loader: DataLoader, steps: int) -> list[Tensor]:
    model, losses = ConvAutoencoder(1, 28, **dict(config.model)), []
    rate = config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0)
    for x in islice(cycle_loader(loader), steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x)[0], x)
        loss.backward()
        clip(model, config)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def adversaries(config: ScratchConfig, loader: DataLoader, steps: int) -> list[Tensor]:
    latent, width, losses = config.model.latent_dim, config.model.width, []
    generator = Generator("dcgan", 1, 28, width, latent, 0)
    discriminator = Discriminator("dcgan", 1, 28, width, 0, False)
    rate, betas = config.optimizer.learning_rate, config.optimizer.betas
    discriminator_adam, generator_adam = (
        torch.optim.AdamW(player.parameters(), rate, betas, weight_decay=0)
        for player in (discriminator, generator)
    )
    for x in islice(cycle_loader(loader), steps):
        ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
        discriminator_adam.zero_grad()
        F.binary_cross_entropy_with_logits(discriminator(x), ones).backward()
        generated = generator(torch.randn(len(x), latent))
        F.binary_cross_entropy_with_logits(discriminator(generated.detach()), zeros).backward()
        clip(discriminator, config)
        discriminator_adam.step()
        generator_adam.zero_grad()
        loss = F.binary_cross_entropy_with_logits(discriminator(generated), ones)
        loss.backward()
        clip(generator, config)
        generator_adam.step()
        losses.append(loss.detach())
    return losses


def segment(config: ScratchConfig, loader: DataLoader, steps: int) -> list[Tensor]:
    model, use, losses = UNet(1, 2, **dict(config.model)), USES["segment"](config), []
    optimizer = torch.optim.AdamW(model.parameters(), config.optimizer.learning_rate)
    for pair in islice(cycle_loader(loader), steps):
        optimizer.zero_grad()
        loss = use.loss(model(pair[:, :1]), (pair[:, 1] > 0).long())
        loss.backward()
        clip(model, config)
        optimizer.step()
        losses.append(loss.detach())
    return losses
