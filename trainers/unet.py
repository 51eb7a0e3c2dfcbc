"""U-Net from pictures to pictures (Ronneberger et al. 2015): masks, colours, other pictures, better ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import pictures, write_grid
from trainers.data.rng import Draws
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.adversarial import LOSSES, frozen
from trainers.from_scratch.image_sets import Images, found
from trainers.from_scratch.networks import PatchDiscriminator, UNet
from trainers.from_scratch.task import SHOWN, FromScratch
from trainers.from_scratch.tiling import tiled
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.colorize import Colorize
from trainers.from_scratch.uses.segment import Segment


class UNetTask(FromScratch):
    """One network; for pix2pix a second one that tells its pictures from true ones, patch by patch."""

    saved = "unet"

    @property
    def tag(self) -> str:
        return "image-segmentation" if self.config.use == "segment" else "image-to-image"

    def __init__(self, config: UNetConfig, accelerator: Accelerator) -> None:
        self.use = USES[config.use](config)
        self.masks, self.target = self.use.masks, self.use.target
        super().__init__(config, accelerator)
        if isinstance(self.use, Colorize):
            self.use.prepare(self.train, self.test)
        self.add("unet", UNet(self.use.inputs, self.use.outputs, **dict(config.model)))
        if config.adversarial:
            critic = PatchDiscriminator(self.use.inputs - self.use.noise + self.use.outputs, config.model.width)
            self.add("discriminator", critic, average=False)

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        x, y = self.use.pair(batch["pixels"], rng)
        prediction = self.players["unet"].module(x)
        loss = self.use.loss(prediction, y)
        if self.config.adversarial:
            critic_loss, generator_loss = LOSSES["non_saturating"]
            discriminator, given = self.players["discriminator"].module, self.given(x)
            true, made = torch.cat([given, y], 1), torch.cat([given, prediction], 1)
            both = discriminator(torch.cat([true, made.detach()]))
            yield "discriminator", critic_loss(*both.chunk(2))
            critic = self.accelerator.unwrap_model(discriminator)
            with frozen(critic):
                score = critic(made)
                yield "unet", self.config.objective.l1_weight * loss + generator_loss(score, score)
        else:
            yield "unet", loss

    def given(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] - self.use.noise]

    @torch.no_grad()
    def apply(self, images: Images, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """What is shown, what is made of it, what is wanted; a row's noise is always the same."""
        x, y = self.use.pair(images.take(rows), Draws(self.config.seed, -1, rows, self.device))
        return x, self.use.decide(tiled(self.model, x, self.config.data.resolution)), y

    def sample(self, folder: Path) -> None:
        images, sheet = self.test or self.train, {"shown": [], "made": [], "true": []}
        for i in range(min(SHOWN if self.config.data.resolution <= 64 else 3, len(images))):
            x, made, y = self.apply(images, range(i, i + 1))
            for row, picture in zip(
                sheet.values(), (self.given(x), self.use.render(x, made), self.use.render(x, y)), strict=True
            ):
                row += pictures(picture)
        write_grid(list(sheet.items()), folder / "grid.png")

    def example(self) -> str:
        noise = ", the last one noise from N(0, 1)" if self.use.noise else ""
        return f"y = model(x)  # x: {self.use.inputs} channels in [-1, 1]{noise}; or scripts/translate.py RUN PICTURES"

    def measure(self) -> dict[str, float | str]:
        """The use's figures over all pixels; of pictures that may be of several sizes, the means of theirs."""
        count, size = len(self.test), 1 if self.config.data.side is None else 100
        parts = [self.apply(self.test, range(i, min(i + size, count))) for i in range(0, count, size)]
        if isinstance(self.use, Segment):
            made, y = (torch.cat([part[k].flatten() for part in parts]) for k in (1, 2))
            return self.use.figures(parts[0][0], made, y)
        if size > 1:
            return self.use.figures(*(torch.cat(part) for part in zip(*parts, strict=True)))
        figures = [self.use.figures(*part) for part in parts]
        return {name: sum(figure[name] for figure in figures) / count for name in figures[0]}


class Translator:
    """A finished run, to be called with the path of a picture of any size; gives a picture of its size.

    Masks come as classes, 0 and 255 if there are two.
    """

    def __init__(self, config: UNetConfig, run: Path) -> None:
        self.use, self.tile = USES[config.use](config), config.data.resolution
        self.model = UNet.from_pretrained(run / "model").to(best_device())
        self.mode = "L" if config.data.channels == 1 else "RGB"

    @torch.no_grad()
    def __call__(self, path: Path) -> Image.Image:
        image = np.array(found(path).decode().convert(self.mode))
        pixels = torch.from_numpy(image).reshape(*image.shape[:2], -1).permute(2, 0, 1)[None].to(self.model.device)
        x = self.use.show(pixels)
        y = self.use.decide(tiled(self.model, x, self.tile))
        if isinstance(self.use, Segment):
            return Image.fromarray(y[0].byte().cpu().numpy() * (255 if self.use.outputs == 2 else 1))
        return pictures(self.use.render(x, y))[0]
