"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al.
2008), anomalies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.data.rng import SampleRng, choose_among, derive_seed
from trainers.data.transfer import send_numbers
from trainers.from_scratch.anomaly_measures import AnomalyMeasures
from trainers.from_scratch.codes import corrupt, plot_codes
from trainers.from_scratch.defects import load_defects
from trainers.from_scratch.image_sets import ImageSet
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask, describe_input
from trainers.metrics.image_quality import psnr, ssim
from trainers.run_folder import FINAL, GRID_NAME, SAMPLES
from trainers.training.facts import Facts

NUM_PROBE_PICTURES = 20000  # training pictures that the linear probe is fitted on, by chance
NUM_PLOT_PICTURES = 2000  # test pictures in the plot of the codes


class Autoencoder(FromScratchTask):
    """Learns to give back what it is shown through a code of `latent_dim` numbers."""

    saved_player, pipeline_tag = "autoencoder", "image-feature-extraction"

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        self.measures_every_class = config.use == "anomaly"
        super().__init__(config, accelerator)
        self.anomalies: AnomalyMeasures | None = None
        if config.use == "anomaly":
            defects = load_defects(config.data, self.train_images, self.device, self.intake)
            self.tell_of_data()
            self.anomalies = AnomalyMeasures(config, self.train_images, self.test_images, defects)
        self.add_player(
            "autoencoder",
            ConvAutoencoder(config.data.channels, config.data.resolution, **dict(config.model)),
        )

    def describe_pictures(self) -> Facts:
        described = super().describe_pictures()
        if self.config.train.early_stop and self.anomalies and self.anomalies.defects:
            described["defects"] = self.anomalies.defects.images.describe()
        return described

    def describe_measured(self) -> Facts:
        measured = super().describe_measured()
        if self.anomalies and self.anomalies.defects:
            measured["defects"] = self.anomalies.defects.images.describe()["digest"]
        return measured

    def losses(self, batch: dict[str, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """The mean squared error of what comes out and, when variational, the divergence from the
        unit Gaussian."""
        x, model = to_float(batch["pixels"]), self.config.model
        corrupted = corrupt(x, self.config, rng)
        eps = rng.normal((len(x), model.latent_dim)) if model.variational else None
        y, mean, logvar = self.players["autoencoder"].module(corrupted, eps)
        loss = (y - x).square().mean()
        if model.variational:
            divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
            loss = loss + self.config.objective.kl_weight * divergence
        yield "autoencoder", loss

    def choose(self, rows: Sequence[int], count: int) -> Sequence[int]:
        """Some of these rows, always the same ones."""
        return choose_among(derive_seed(self.config.seed, "shown"), rows, count)

    @torch.no_grad()
    def reconstruct(
        self, images: ImageSet, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those pictures, what is shown of them (always the same), what comes out, and their own
        codes."""
        parts = []
        for first in range(0, len(rows), 1000):
            part = rows[first : first + 1000]
            x = to_float(images.take(part))
            corrupted = corrupt(x, self.config, SampleRng(self.config.seed, -1, part, self.device))
            output = self.model(x if self.config.use == "anomaly" else corrupted)[0].clamp(-1, 1)
            parts.append((x, corrupted, output, self.model.encode(x)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def sample(self, folder: Path) -> None:
        images = self.test_images or self.train_images
        pictures = range(len(images))
        if self.anomalies:
            good = self.anomalies.good_rows()
            images, pictures = (images, good) if good else (self.train_images, pictures)
        true, corrupted, output, codes = self.reconstruct(
            images, self.choose(pictures, GRID_COLUMNS)
        )
        rows = [
            ("true", to_pil(true)),
            *([("shown", to_pil(corrupted))] if self.config.use != "reconstruct" else []),
            ("made", to_pil(output)),
        ]
        if self.anomalies:
            rows += self.anomalies.grid_rows(self.model, true)
        else:
            rows += self.decoded_codes(codes)
        write_grid(rows, folder / GRID_NAME, tile=64)

    @torch.no_grad()
    def decoded_codes(self, codes: Tensor) -> Iterator[tuple[str, list[Image.Image]]]:
        """Rows of pictures between codes and, when variational, of codes drawn by chance."""
        weights = torch.linspace(0, 1, GRID_COLUMNS, device=self.device)[:, None]
        for a, b in zip(codes[:-1:3], codes[1::3], strict=False):
            yield "from one code to another", to_pil(self.model.decode(a + weights * (b - a)))
        if self.config.model.variational:
            rng = SampleRng(self.config.seed, -1, range(GRID_COLUMNS), self.device)
            yield "from random codes", to_pil(self.model.decode(rng.normal(codes.shape)))

    def usage_example(self) -> str:
        scores = "; scores and heat maps: scripts/encode.py" if self.anomalies else ""
        return (
            f"codes = model.encode(x)  # x: {describe_input(self.config)}; "
            f"model.decode(codes) gives pictures{scores}"
        )

    @property
    def has_labels(self) -> bool:
        return self.config.data.label_column is not None

    def measure(self, rows: Sequence[int]) -> dict[str, float | str]:
        x, _, output, _ = self.reconstruct(self.test_images, rows)
        return self.compare(x, output, rows, is_final=False)

    def compare(
        self, x: Tensor, output: Tensor, rows: Sequence[int], is_final: bool
    ) -> dict[str, float | str]:
        """psnr (dB) and ssim of what comes out; for anomalies of good pictures alone, and how well
        those are told from others."""
        if self.anomalies is None:
            return {"psnr": psnr(output, x), "ssim": ssim(output, x)}
        is_good, figures = self.anomalies.is_good(rows), {}
        if is_final:
            figures = self.anomalies.final_figures(self.model, x, is_good)
        elif self.anomalies.can_tell:
            scored = self.anomalies.compare(self.model, x, is_good, self.num_validated)
            figures = scored.figures()
        good = output[is_good], x[is_good]
        return figures | {"psnr": psnr(*good), "ssim": ssim(*good)}

    def evaluate(self) -> dict[str, float | str]:
        """As `compare`; linear_probe: accuracy of a linear reader of the codes."""
        images = self.test_images
        x, _, output, codes = self.reconstruct(images, range(len(images)))
        metrics = self.compare(x, output, range(len(images)), is_final=True)
        if not self.has_labels:
            return metrics
        shown = self.choose(range(len(images)), NUM_PLOT_PICTURES)
        rows = send_numbers(shown, self.device)
        path = self.config.output_dir / SAMPLES / FINAL / "codes.png"
        plot_codes(codes[rows], images.labels[rows], images.class_names, path)
        if self.config.use != "anomaly":
            metrics["linear_probe"] = self.linear_probe(codes, images.labels)
        return metrics

    def save_into(self, folder: Path) -> None:
        super().save_into(folder)
        if self.anomalies:
            self.anomalies.judge_of(self.model).save(folder)

    def linear_probe(self, codes: Tensor, truth: Tensor) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on training pictures that
        are drawn by chance; NaN where those are of one class."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows = self.choose(range(len(self.train_images)), NUM_PROBE_PICTURES)
        labels = self.train_images.take_labels(rows)
        if len(labels.unique()) < 2:
            return float("nan")
        train_codes = self.reconstruct(self.train_images, rows)[3]
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(train_codes.cpu().numpy(), labels.cpu().numpy())
        return float(reader.score(codes.cpu().numpy(), truth.cpu().numpy()))
