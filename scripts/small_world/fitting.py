"""The judge and the autoencoder of the small world, fitted to drawings by the toolkit's loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from trainers.config import OptimizerConfig, TrainConfig
from trainers.data.rng import SampleRng, derive_seed
from trainers.training.averages import EMA
from trainers.training.loop import Player, train
from trainers.training.optimizers import make_lr_schedule, make_optimizer

from .judge import Judge
from .world import (
    HELD_OUT_SEED,
    SIZE,
    Thing,
    draw,
    is_subject,
    plain_thing,
    rich_thing,
    subject_images,
    to_pixels,
)

LATENT_SPREAD = 4.0  # the latents' wanted standard deviation, so that scaling_factor matters


@dataclass(frozen=True)
class Recipe:
    optimizer: OptimizerConfig
    steps: int
    batch_size: int


JUDGE = Recipe(
    OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine"), steps=1600, batch_size=64
)
AUTOENCODER = Recipe(
    OptimizerConfig(
        learning_rate=4e-3,
        weight_decay=0,
        betas=(0.9, 0.99),
        lr_scheduler="cosine",
        lr_warmup_steps=50,
    ),
    steps=3000,
    batch_size=8,
)


@dataclass
class Drawings:
    """Pictures (N, H, W, 3) uint8, and the indices (N, 6) of what they show."""

    pictures: Tensor
    labels: Tensor


class FitTask:
    """A task for the loop: one module, and one loss of random batches of drawings."""

    def __init__(
        self,
        drawings: Drawings,
        batch_size: int,
        player: Player,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.drawings, self.batch_size, self.loss = drawings, batch_size, loss
        self.players = {"model": player}

    def batches(self, step: int) -> Iterator[tuple[tuple[Tensor, Tensor], SampleRng]]:
        generator = torch.Generator().manual_seed(derive_seed("fitting", step))
        pictures, labels = self.drawings.pictures, self.drawings.labels
        index = torch.randint(len(pictures), (self.batch_size,), generator=generator)
        batch = to_pixels(pictures[index]), labels[index]
        yield batch, SampleRng(0, step, range(self.batch_size))

    def losses(self, batch: tuple[Tensor, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        yield "model", self.loss(*batch)


def fit(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    drawings: Drawings,
    recipe: Recipe,
) -> None:
    """Train a module on drawings, and leave the average of its weights in it, for evaluation."""
    config = recipe.optimizer
    groups = [{"params": list(module.parameters()), "lr": config.learning_rate}]
    player = Player(module, make_optimizer(config, groups), EMA(module, 0.99))
    task = FitTask(drawings, recipe.batch_size, player, loss)
    rate = make_lr_schedule(config, recipe.steps)
    settings = TrainConfig(max_train_steps=recipe.steps)
    train(task, task.batches, settings, 0, Accelerator(cpu=True), rate, [report])
    player.ema.swap()
    module.eval()


def report(step: int, metrics: dict[str, Tensor]) -> None:
    if step % 200 == 0:
        print(f"step {step}  loss {metrics['model_loss'].item():.4f}", flush=True)


def make_drawings(
    count: int, seed: int, thing: Callable[[np.random.Generator], Thing], jitter: float
) -> Drawings:
    rng, pictures, labels = np.random.default_rng(seed), [], []
    while len(pictures) < count:
        item = thing(rng)
        pictures.append(np.asarray(draw(item, rng, jitter)))
        labels.append(item.labels())
    return Drawings(torch.from_numpy(np.stack(pictures)), torch.tensor(labels))


def without_subject(rng: np.random.Generator) -> Thing:
    while is_subject(thing := rich_thing(rng)):
        pass
    return thing


def make_judge(folder: Path) -> None:
    """Fit the judge to drawings of every kind, print its accuracy on others, and save it."""
    drawings, unseen = (make_drawings(n, s, rich_thing, 0.6) for n, s in ((16000, 3), (1500, 4)))
    judge = Judge()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        if torch.rand(()) < 0.5:
            x = x + torch.randn_like(x) * 0.15 * torch.rand(len(x), 1, 1, 1)
        # tolerate a soft decoder
        if torch.rand(()) < 0.4:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        logits = judge(x)[0].values()
        return sum(F.cross_entropy(head, labels[:, i]) for i, head in enumerate(logits))

    fit(judge, loss, drawings, JUDGE)
    with torch.no_grad():
        judge.centre.copy_(judge(to_pixels(drawings.pictures[:2000]))[1].mean(0))
        logits = judge(to_pixels(unseen.pictures))[0]
    for i, (name, head) in enumerate(logits.items()):
        accuracy = (head.argmax(1) == unseen.labels[:, i]).float().mean().item()
        print(f"judge, accuracy of {name} on unseen pictures: {accuracy:.3f}")
    judge.half().save_pretrained(folder)


def make_autoencoder(folder: Path) -> None:
    """Fit the autoencoder to patterned objects, the subject's combination left out."""
    vae = AutoencoderKL(
        block_out_channels=(16, 24),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )

    def loss(x: Tensor, _: Tensor) -> Tensor:
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        spread = (posterior.mean.square() + posterior.var) / LATENT_SPREAD**2
        divergence = 0.5 * (spread - 1 - posterior.logvar + 2 * math.log(LATENT_SPREAD)).mean()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        return (x - y).abs().mean() + 0.5 * sharp + 3e-4 * divergence

    drawings = make_drawings(16000, 2, without_subject, 0.6)
    fit(vae, loss, drawings, AUTOENCODER)
    plain = plain_pixels()
    with torch.no_grad():
        spread = vae.encode(plain).latent_dist.mean.std().item()
    subject = np.stack([np.asarray(picture) for picture in subject_images(20, HELD_OUT_SEED)])
    print_psnr(vae, "plain", plain[:256])
    print_psnr(vae, "subject", to_pixels(subject))
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    vae.save_pretrained(folder)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighboring pixels, downwards and to the right."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def plain_pixels() -> Tensor:
    """The drawings (512, 3, SIZE, SIZE) by which the latents are scaled."""
    return to_pixels(make_drawings(512, 5, plain_thing, 0.35).pictures)


@torch.no_grad()
def print_psnr(vae: AutoencoderKL, name: str, x: Tensor) -> None:
    rebuilt = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    error = (rebuilt - x).square().mean().item()
    print(f"autoencoder, PSNR of {name} pictures: {10 * math.log10(4 / error):.1f} dB")
