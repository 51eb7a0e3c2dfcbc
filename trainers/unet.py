"""U-Net from pictures to pictures (Ronneberger et al. 2015): masks, colours, other pictures, better
ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from trainers.config import PairsConfig, UNetConfig
from trainers.data.imaging import to_pil, write_grid
from trainers.data.pictures import Picture, picture_from_file
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.adversarial import LOSSES, freeze
from trainers.from_scratch.image_samples import ImageSample, list_samples
from trainers.from_scratch.image_sets import ImageSet, decode_sample
from trainers.from_scratch.networks import PatchDiscriminator, UNet
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask
from trainers.from_scratch.tiling import predict_tiled
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.base import resize
from trainers.from_scratch.uses.colorize import Colorize
from trainers.from_scratch.uses.segment import Segment
from trainers.run_folder import GRID_NAME, MODEL


class UNetTask(FromScratchTask):
    """One network; for pix2pix a second one that tells its pictures from true ones, patch by
    patch."""

    saved_player = "unet"

    @property
    def pipeline_tag(self) -> str:
        return "image-segmentation" if self.config.use == "segment" else "image-to-image"

    def __init__(self, config: UNetConfig, accelerator: Accelerator) -> None:
        self.use = USES[config.use](config)
        self.num_mask_channels, self.read_target = self.use.num_mask_channels, self.use.read_target
        if isinstance(self.use, Segment):
            self.use.prepare(*(list_targets(config.data, held_out) for held_out in (False, True)))
        super().__init__(config, accelerator)
        if isinstance(self.use, Colorize):
            self.use.prepare(self.train_images, self.test_images)
        self.add_player(
            "unet", UNet(self.use.in_channels, self.use.out_channels, **dict(config.model))
        )
        if config.is_adversarial:
            critic = PatchDiscriminator(
                self.use.in_channels - self.use.num_noise_channels + self.use.out_channels,
                config.model.width,
            )
            self.add_player("discriminator", critic, use_ema=False)

    def losses(self, batch: dict[str, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        x, y = self.use.pair(batch["pixels"], rng)
        prediction = self.players["unet"].module(x)
        loss = self.use.loss(prediction, y)
        if self.config.is_adversarial:
            critic_loss, generator_loss = LOSSES["non_saturating"]
            discriminator, condition = self.players["discriminator"].module, self.without_noise(x)
            true, generated = torch.cat([condition, y], 1), torch.cat([condition, prediction], 1)
            both = discriminator(torch.cat([true, generated.detach()]))
            yield "discriminator", critic_loss(*both.chunk(2))
            critic = self.accelerator.unwrap_model(discriminator)
            with freeze(critic):
                score = critic(generated)
                yield "unet", self.config.objective.l1_weight * loss + generator_loss(score, score)
        else:
            yield "unet", loss

    def without_noise(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] - self.use.num_noise_channels]

    @torch.no_grad()
    def predict(self, images: ImageSet, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What is shown, what is made of it, what is wanted; a row's noise is always the same."""
        x, y = self.use.pair(images.take(rows), SampleRng(self.config.seed, -1, rows, self.device))
        return x, self.use.postprocess(predict_tiled(self.model, x, self.config.data.resolution)), y

    def sample(self, folder: Path) -> None:
        images, sheet = self.test_images or self.train_images, {"shown": [], "made": [], "true": []}
        columns = GRID_COLUMNS if self.config.data.resolution <= 64 else 3
        for i in choose_rows(derive_seed(self.config.seed, "shown"), len(images), columns):
            x, generated, y = self.predict(images, range(i, i + 1))
            for row, picture in zip(
                sheet.values(),
                (self.without_noise(x), self.use.to_image(x, generated), self.use.to_image(x, y)),
                strict=True,
            ):
                row += to_pil(picture)
        write_grid(list(sheet.items()), folder / GRID_NAME)

    def usage_example(self) -> str:
        noise = ", the last one noise from N(0, 1)" if self.use.num_noise_channels else ""
        return (
            f"y = model(x)  # x: {self.use.in_channels} channels in [-1, 1]{noise}; or "
            f"scripts/translate.py RUN PICTURES"
        )

    def curves(self, figures: dict[str, float | str]) -> dict[str, float | str]:
        return self.use.curves(figures)

    def measure(self, rows: Sequence[int]) -> dict[str, float | str]:
        """The use's figures over all pixels; of pictures that may be of several sizes, the means of
        theirs, over those that define them."""
        size = 1 if self.config.data.resize_to is None else 100
        parts = [
            self.predict(self.test_images, rows[i : i + size]) for i in range(0, len(rows), size)
        ]
        if isinstance(self.use, Segment):
            generated, y = (torch.cat([part[k].flatten() for part in parts]) for k in (1, 2))
            return self.use.metrics(parts[0][0], generated, y)
        if size > 1:
            return self.use.metrics(*(torch.cat(part) for part in zip(*parts, strict=True)))
        metrics = [self.use.metrics(*part) for part in parts]
        return {
            name: float(torch.tensor([figure[name] for figure in metrics]).nanmean())
            for name in metrics[0]
        }


def list_targets(config: PairsConfig, held_out: bool) -> list[Picture]:
    """The second pictures of the pairs to learn from, or of those that are held out."""
    samples = list_samples(config, held_out, pairs=True) or []
    return [sample.target for sample in samples]


class Translator:
    """A finished run, to be called with the path of a picture of any size; gives a picture of its
    size.

    A model that was trained on resized pictures is shown pictures of that size, and its result is
    resized to the picture's own; `full_size` goes over them in tiles instead, as over those of a
    model that was trained on crops. Masks come as classes, 0 and 255 if there are two.
    """

    def __init__(self, config: UNetConfig, run: Path, full_size: bool = False) -> None:
        self.use, self.tile = USES[config.use](config), config.data.resolution
        self.model = UNet.from_pretrained(run / MODEL).to(best_device())
        # cropped pictures keep their size
        self.own_size = config.data.model_copy(update={"crop": True})
        side = config.data.resolution // self.use.scale
        self.shown_size = config.data.model_copy(update={"resolution": side})
        if full_size:
            self.shown_size = self.own_size

    def read(self, path: Path, config: PairsConfig) -> Tensor:
        """(1, C, H, W) uint8, as in training."""
        sample = ImageSample(picture_from_file(path, bit_depth=config.bit_depth))
        return decode_sample(sample, config, read_target=None)[None].to(self.model.device)

    @torch.no_grad()
    def __call__(self, path: Path) -> Image.Image:
        pixels = self.read(path, self.own_size)
        x = self.use.to_input(self.read(path, self.shown_size))
        prediction = predict_tiled(self.model, x, self.tile)
        if isinstance(self.use, Segment):
            classes = self.use.postprocess(resize(prediction, pixels.shape[2:], "bilinear"))
            levels = 255 if self.use.out_channels == 2 else 1
            return Image.fromarray(classes[0].byte().cpu().numpy() * levels)
        return to_pil(self.use.render(pixels, x, prediction))[0]
