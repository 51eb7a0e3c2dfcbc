"""Generative adversarial network (Goodfellow et al. 2014), with what is known against its
failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from trainers.config import GanConfig
from trainers.data.imaging import to_float, to_pil, write_gif, write_grid
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.from_scratch.adversarial import LOSSES, freeze
from trainers.from_scratch.augment import differentiable_augment
from trainers.from_scratch.balance import WatchBalance, class_balance
from trainers.from_scratch.checks import check_gan_measurable
from trainers.from_scratch.classifier import classifier_features, train_classifier
from trainers.from_scratch.networks import Classifier, Discriminator, Generator
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask, describe_input
from trainers.metrics.feature_networks import FEATURE_NETWORKS, NamedFeatures, dino_features
from trainers.metrics.image_quality import distribution_metrics
from trainers.run_folder import FINAL, GRID_NAME, SAMPLES
from trainers.training.loop import StepMetrics, averaged_weights

NUM_METRIC_PICTURES = 10000  # generated for the metrics


class Gan(FromScratchTask):
    """z ~ N(0, I) to pictures, against a discriminator that tells them from real ones."""

    saved_player, pipeline_tag = "generator", "unconditional-image-generation"

    def __init__(self, config: GanConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        if self.test_images is not None:
            by_classifier = config.validation.features == "classifier"
            check_gan_measurable(self.train_images, self.test_images, by_classifier)
            if config.validation.features == "dino":
                # better missed now than after the training
                dino_features(torch.device("cpu"))
        data, model = config.data, config.model
        classes = int(self.train_images.labels.max()) + 1 if model.conditional else 0
        shape = {
            "architecture": model.architecture,
            "channels": data.channels,
            "size": data.resolution,
            "width": model.width,
            "classes": classes,
        }
        self.add_player("generator", Generator(**shape, latent_dim=model.latent_dim))
        critic = Discriminator(**shape, spectral=model.spectral_norm)
        self.add_player("discriminator", critic, config.optimizer.discriminator_lr, use_ema=False)
        self.balance_metrics: StepMetrics = {}
        self.callbacks = [WatchBalance(self)]

    def losses(self, batch: dict[str, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        objective = self.config.objective
        critic_loss, generator_loss = LOSSES[objective.loss]
        generator, discriminator = (player.module for player in self.players.values())
        x, label = to_float(batch["pixels"]), batch["label"]
        z = rng.normal((len(x), self.config.model.latent_dim))
        generated = generator(z, label)  # (B, C, S, S)
        real_augmented = differentiable_augment(x, objective.augment, rng)
        generated_augmented = differentiable_augment(generated, objective.augment, rng)
        # both at once, so that their batch statistics are the same
        both = torch.cat([real_augmented, generated_augmented.detach()])
        real_score, generated_score = discriminator(both, label.repeat(2)).chunk(2)  # (B,)
        self.balance_metrics = {
            "order": (real_score > generated_score).float().mean().detach(),
            "gap": (real_score - generated_score).mean().detach(),
            "diversity": (generated.std(0).mean() / (x.std(0).mean() + 1e-6)).detach(),
        }
        penalty = self.lazy_regularization(real_augmented, generated_augmented, label, rng)
        yield "discriminator", critic_loss(real_score, generated_score) + penalty
        if rng.step % objective.generator_every == 0:
            critic = self.accelerator.unwrap_model(discriminator)
            with freeze(critic):
                both = torch.cat([real_augmented, generated_augmented])
                real_score, generated_score = critic(both, label.repeat(2)).chunk(2)
                yield "generator", generator_loss(real_score, generated_score)

    def lazy_regularization(
        self, x: Tensor, generated: Tensor, label: Tensor, rng: SampleRng
    ) -> Tensor | float:
        """Lazy (Karras et al. 2020): every so many steps, as many times as heavy."""
        objective = self.config.objective
        total = 0.0
        if rng.step % objective.penalty_every:
            return total
        between = torch.lerp(x, generated, rng.uniform()[:, None, None, None])
        penalties = [
            (objective.r1 / 2, x, 0),
            (objective.r2 / 2, generated, 0),
            (objective.gradient_penalty, between, 1),
        ]
        for weight, where, target_norm in penalties:
            if weight:
                total = total + weight * self.gradient_penalty(where.detach(), label, target_norm)
        return objective.penalty_every * total

    def gradient_penalty(self, x: Tensor, label: Tensor, target_norm: float) -> Tensor:
        """Mean of (norm of the score's gradient - wanted)^2."""
        critic = self.accelerator.unwrap_model(self.players["discriminator"].module)
        x = x.requires_grad_()
        score = critic(x, label).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        square = gradient.square().sum((1, 2, 3))
        if not target_norm:
            return square.mean()
        # the small number keeps the root's slope finite where the gradient is zero
        return ((square + 1e-12).sqrt() - target_norm).square().mean()

    @torch.no_grad()
    def generate(self, rows: range) -> Tensor:
        """Picture i of the run, always from the same z."""
        return self.model(self.z(rows), self.labels(rows))

    def z(self, rows: range, step: int = -1) -> Tensor:
        return SampleRng(self.config.seed, step, rows, self.device).normal(
            (len(rows), self.config.model.latent_dim)
        )

    def labels(self, rows: range) -> Tensor:
        """Classes take turns."""
        return torch.tensor(rows, device=self.device) % max(1, self.model.config.classes)

    def sample(self, folder: Path) -> None:
        """Always from the same z."""
        rows = [
            ("", to_pil(self.generate(range(first, first + GRID_COLUMNS))))
            for first in range(0, GRID_COLUMNS * GRID_COLUMNS, GRID_COLUMNS)
        ]
        write_grid([("made", rows[0][1]), *rows[1:]], folder / GRID_NAME, tile=64)

    def finish(self, steps: int) -> None:
        super().finish(steps)
        with averaged_weights(self):
            write_gif(self.interpolate(), self.config.output_dir / SAMPLES / FINAL / "walk.gif")

    @torch.no_grad()
    def interpolate(
        self, count: int = 16, legs: int = 4, frames: int = 10
    ) -> Iterator[list[Image.Image]]:
        """So many pictures, each on its way from one z to the next along a great circle, and at
        last to the first."""
        label = self.labels(range(count))
        for a, b in pairwise(self.z(range(count), -2 - leg % legs) for leg in range(legs + 1)):
            for angle in torch.linspace(0, torch.pi / 2, frames + 1)[:-1]:
                yield to_pil(self.model(a * angle.cos() + b * angle.sin(), label))

    def usage_example(self) -> str:
        label, legend = "", ""
        if self.config.model.conditional:
            label = f", torch.arange(10) % {self.model.config.classes}"
            names = enumerate(self.train_images.class_names)
            legend = "; labels: " + ", ".join(f"{index} is {name!r}" for index, name in names)
        return (
            f"x = model(torch.randn(10, {self.config.model.latent_dim}){label})  # "
            f"{describe_input(self.config)}{legend}"
        )

    @cached_property
    def feature_network(self) -> tuple[NamedFeatures, Classifier | None]:
        """What pictures are compared in, and the classifier that it is made of, if it is."""
        kind = self.config.validation.features
        if kind != "classifier":
            return FEATURE_NETWORKS[kind](self.device), None
        classifier = train_classifier(self.train_images, self.config.data)
        return classifier_features(classifier, self.test_images), classifier

    def evaluate(self) -> dict[str, float | str]:
        seed = derive_seed(self.config.seed, "measured")
        return self.measure(choose_rows(seed, len(self.test_images), NUM_METRIC_PICTURES))

    def measure(self, rows: Sequence[int]) -> dict[str, float | str]:
        """Compare generated pictures with as many test pictures, see `distribution_metrics`.

        With a classifier, also how the classes are balanced, see `class_balance`.
        """
        (name, features), classifier = self.feature_network
        starts = range(0, len(rows), 500)
        generated = torch.cat([self.generate(range(i, min(i + 500, len(rows)))) for i in starts])
        metrics = {
            "features": name,
            **distribution_metrics(generated, to_float(self.test_images.take(rows)), features),
        }
        return metrics | (class_balance(generated, classifier) if classifier else {})
