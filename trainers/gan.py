"""Generative adversarial network (Goodfellow et al. 2014), with what is known against its failures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from trainers.config import GanConfig
from trainers.data.imaging import floats, pictures, write_film, write_grid
from trainers.data.rng import Draws
from trainers.errors import UserError
from trainers.from_scratch.adversarial import LOSSES, frozen
from trainers.from_scratch.augment import differentiable
from trainers.from_scratch.classifier import classify, own_classes, train_classifier
from trainers.from_scratch.networks import Classifier, Discriminator, Generator
from trainers.from_scratch.task import SHOWN, FromScratch, shape
from trainers.metrics.feature_networks import inception, mobilenet
from trainers.metrics.image_quality import distances
from trainers.training.loop import Means, averaged

MEASURED = 10000  # pictures made for the figures


FEWEST = 10  # held-out pictures


COLLAPSED = 0.5  # spread of made pictures, relative to real ones, below which there is a warning


WON = 0.995  # share of pairs that the discriminator puts in order, above which there is a warning


class Gan(FromScratch):
    """z ~ N(0, I) to pictures, against a discriminator that tells them from real ones."""

    saved, tag = "generator", "unconditional-image-generation"

    def __init__(self, config: GanConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        if self.test is not None and len(self.test) < FEWEST:
            raise UserError(f"{len(self.test)} pictures are held out, {FEWEST} are the fewest to measure with")
        data, model = config.data, config.model
        classes = int(self.train.labels.max()) + 1 if model.conditional else 0
        shape = {"architecture": model.architecture, "channels": data.channels, "size": data.resolution}
        shape |= {"width": model.width, "classes": classes}
        self.add("generator", Generator(**shape, latent_dim=model.latent_dim))
        critic = Discriminator(**shape, spectral=model.spectral_norm)
        self.add("discriminator", critic, config.optimizer.discriminator_lr, average=False)
        self.means: Means = {}
        self.observers = [Watch(self)]

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        objective, generator, discriminator = self.config.objective, *(self.players[n].module for n in self.players)
        critic_loss, generator_loss = LOSSES[objective.loss]
        x, label = floats(batch["pixels"]), batch["label"]
        made = generator(rng.normal((len(x), self.config.model.latent_dim)), label)  # (B, C, S, S)
        shown, made_shown = (differentiable(part, objective.augment, rng) for part in (x, made))
        both = discriminator(torch.cat([shown, made_shown.detach()]), label.repeat(2))
        real_score, made_score = both.chunk(2)  # (B,)
        self.means = {
            "order": (real_score > made_score).float().mean().detach(),
            "gap": (real_score - made_score).mean().detach(),
            "diversity": (made.std(0).mean() / (x.std(0).mean() + 1e-6)).detach(),
        }
        yield "discriminator", critic_loss(real_score, made_score) + self.penalty(shown, made_shown, label, rng)
        if rng.step % objective.generator_every == 0:
            critic = self.accelerator.unwrap_model(discriminator)
            with frozen(critic):
                real_score, made_score = critic(torch.cat([shown, made_shown]), label.repeat(2)).chunk(2)
                yield "generator", generator_loss(real_score, made_score)

    def penalty(self, x: Tensor, made: Tensor, label: Tensor, rng: Draws) -> Tensor | float:
        """Lazy (Karras et al. 2020): every so many steps, as many times as heavy."""
        objective, total = self.config.objective, 0.0
        if rng.step % objective.penalty_every:
            return total
        between = torch.lerp(x, made, rng.uniform()[:, None, None, None])
        for weight, at, wanted in (
            (objective.r1 / 2, x, 0),
            (objective.r2 / 2, made, 0),
            (objective.gradient_penalty, between, 1),
        ):
            if weight:
                total = total + weight * self.steepness(at.detach(), label, wanted)
        return objective.penalty_every * total

    def steepness(self, x: Tensor, label: Tensor, wanted: float) -> Tensor:
        """Mean of (norm of the score's gradient - wanted)^2."""
        x, critic = x.requires_grad_(), self.accelerator.unwrap_model(self.players["discriminator"].module)
        score = critic(x, label).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        square = gradient.square().sum((1, 2, 3))
        return ((square + 1e-12).sqrt() - wanted).square().mean() if wanted else square.mean()

    @torch.no_grad()
    def make(self, rows: range) -> Tensor:
        """Picture i of the run, always from the same z."""
        return self.model(self.z(rows), self.label(rows))

    def z(self, rows: range, step: int = -1) -> Tensor:
        return Draws(self.config.seed, step, rows, self.device).normal((len(rows), self.config.model.latent_dim))

    def label(self, rows: range) -> Tensor:
        """Classes take turns."""
        return torch.tensor(rows, device=self.device) % max(1, self.model.config.classes)

    def sample(self, folder: Path) -> None:
        """Always from the same z."""
        rows = [("", pictures(self.make(range(first, first + SHOWN)))) for first in range(0, SHOWN * SHOWN, SHOWN)]
        write_grid([("made", rows[0][1]), *rows[1:]], folder / "grid.png", tile=64)

    def finish(self) -> None:
        super().finish()
        with averaged(self):
            write_film(self.walk(), self.config.output_dir / "samples" / "final" / "walk.gif")

    @torch.no_grad()
    def walk(self, count: int = 16, legs: int = 4, frames: int = 10) -> Iterator[list[Image.Image]]:
        """So many pictures, each on its way from one z to the next along a great circle, and at last to the first."""
        label = self.label(range(count))
        for a, b in pairwise(self.z(range(count), -2 - leg % legs) for leg in range(legs + 1)):
            for angle in torch.linspace(0, torch.pi / 2, frames + 1)[:-1]:
                yield pictures(self.model(a * angle.cos() + b * angle.sin(), label))

    def example(self) -> str:
        label = f", torch.arange(10) % {self.model.config.classes}" if self.config.model.conditional else ""
        return f"x = model(torch.randn(10, {self.config.model.latent_dim}){label})  # {shape(self.config)}"

    def measure(self) -> dict[str, float | str]:
        """Made pictures against as many test pictures: see `metrics.distances`; and, of a classifier, `balance`."""
        kind = self.config.validation.features
        classifier = train_classifier(self.train, self.config.data) if kind == "classifier" else None
        load = mobilenet if kind == "mobilenet" else inception
        name, net = own_classes(classifier, self.test) if classifier else load(self.device)
        count = min(MEASURED, len(self.test))
        made = torch.cat([self.make(range(i, min(i + 500, count))) for i in range(0, count, 500)])
        figures = {"features": name, **distances(made, floats(self.test.take(range(count))), net)}
        return figures | (balance(made, classifier) if classifier else {})


def balance(made: Tensor, classifier: Classifier) -> dict[str, float]:
    """modes: how many classes are made at all; least_share, most_share: of the rarest and the commonest, 1 if all were
    equally common."""
    classes = classifier.config.classes
    shares = classify(classifier, made).bincount(minlength=classes) * classes / len(made)
    modes = int((shares > 0.1).sum())
    return {"modes": modes, "least_share": float(shares.min()), "most_share": float(shares.max())}


class FailureWarning(UserWarning):
    """The players have lost their balance."""


class Watch:
    """Puts the players' balance among the means, and warns once of each failure that shows there."""

    def __init__(self, task: Gan) -> None:
        self.task, self.warned = task, set()
        self.since, self.sums = 0, {}

    def __call__(self, step: int, means: Means) -> None:
        means |= self.task.means
        for name, value in self.task.means.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.since += 1
        if step % self.task.config.tracking.log_every or not self.task.accelerator.is_main_process:
            return
        order, diversity = (self.sums[name].item() / self.since for name in ("order", "diversity"))
        self.since, self.sums = 0, {}
        if diversity < COLLAPSED:
            self.warn("collapse", f"mode collapse: made pictures vary {diversity:.2f} times as much as real ones")
        if order > WON:
            self.warn("won", f"the discriminator tells {order:.1%} of the pairs apart: the generator learns little")

    def warn(self, name: str, message: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            warnings.warn(message, FailureWarning, stacklevel=2)
