"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al.
2008), anomalies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.data.pictures import picture_from_file
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.data.transfer import send_numbers
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.checks import warn_of_squashing
from trainers.from_scratch.codes import anomaly_score, corrupt, plot_codes
from trainers.from_scratch.image_sets import ImageSample, ImageSet, decode_sample
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask, describe_input
from trainers.metrics.image_quality import auroc, psnr, ssim
from trainers.progress import track
from trainers.run_folder import FINAL, GRID_NAME, MODEL, SAMPLES

NUM_PROBE_PICTURES = 20000  # training pictures that the linear probe is fitted on, by chance
NUM_PLOT_PICTURES = 2000  # test pictures in the plot of the codes


class Autoencoder(FromScratchTask):
    """Learns to give back what it is shown through a code of `latent_dim` numbers."""

    saved_player, pipeline_tag = "autoencoder", "image-feature-extraction"

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        self.measures_every_class = config.use == "anomaly"
        super().__init__(config, accelerator)
        self.add_player(
            "autoencoder",
            ConvAutoencoder(config.data.channels, config.data.resolution, **dict(config.model)),
        )

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

    def choose_rows(self, images: ImageSet, count: int) -> Sequence[int]:
        """Always the same ones."""
        return choose_rows(derive_seed(self.config.seed, "shown"), len(images), count)

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
        true, corrupted, output, codes = self.reconstruct(
            images, self.choose_rows(images, GRID_COLUMNS)
        )
        rows = [
            ("true", true),
            *([("shown", corrupted)] if self.config.use != "reconstruct" else []),
            ("made", output),
        ]
        weights = torch.linspace(0, 1, GRID_COLUMNS, device=self.device)[:, None]
        with torch.no_grad():
            interpolations = [
                self.model.decode(a + weights * (b - a))
                for a, b in zip(codes[:-1:3], codes[1::3], strict=False)
            ]
            random_samples = self.model.decode(
                SampleRng(self.config.seed, -1, range(GRID_COLUMNS), self.device).normal(
                    codes.shape
                )
            )
        rows += [("from one code to another", interpolation) for interpolation in interpolations]
        rows += [("from random codes", random_samples)] if self.config.model.variational else []
        write_grid([(title, to_pil(x)) for title, x in rows], folder / GRID_NAME, tile=64)

    def usage_example(self) -> str:
        return (
            f"codes = model.encode(x)  # x: {describe_input(self.config)}; "
            f"model.decode(codes) gives pictures"
        )

    @property
    def has_labels(self) -> bool:
        return self.config.data.label_column is not None

    def measure(self, rows: Sequence[int]) -> dict[str, float | str]:
        x, _, output, _ = self.reconstruct(self.test_images, rows)
        return self.compare(x, output, self.test_images.take_labels(rows))

    def compare(self, x: Tensor, output: Tensor, labels: Tensor) -> dict[str, float | str]:
        """psnr (dB) and ssim of what comes out; for anomalies auroc too: of their score, the learnt
        class against all others, and the other two of the learnt class alone."""
        if self.config.use != "anomaly" or not self.has_labels:
            return {"psnr": psnr(output, x), "ssim": ssim(output, x)}
        is_normal = labels == self.train_images.labels[0]
        score = torch.cat([anomaly_score(self.model, part, self.config) for part in x.split(1000)])
        return {
            "auroc": auroc(~is_normal, score),
            "psnr": psnr(output[is_normal], x[is_normal]),
            "ssim": ssim(output[is_normal], x[is_normal]),
        }

    def evaluate(self) -> dict[str, float | str]:
        """As `compare`; linear_probe: accuracy of a linear reader of the codes."""
        images = self.test_images
        x, _, output, codes = self.reconstruct(images, range(len(images)))
        metrics = self.compare(x, output, images.labels)
        if not self.has_labels:
            return metrics
        rows = send_numbers(self.choose_rows(images, NUM_PLOT_PICTURES), self.device)
        path = self.config.output_dir / SAMPLES / FINAL / "codes.png"
        plot_codes(codes[rows], images.labels[rows], images.class_names, path)
        if self.config.use != "anomaly":
            metrics["linear_probe"] = self.linear_probe(codes, images.labels)
        return metrics

    def linear_probe(self, codes: Tensor, truth: Tensor) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on training pictures that
        are drawn by chance; NaN where those are of one class."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows = self.choose_rows(self.train_images, NUM_PROBE_PICTURES)
        labels = self.train_images.take_labels(rows)
        if len(labels.unique()) < 2:
            return float("nan")
        train_codes = self.reconstruct(self.train_images, rows)[3]
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(train_codes.cpu().numpy(), labels.cpu().numpy())
        return float(reader.score(codes.cpu().numpy(), truth.cpu().numpy()))


@torch.no_grad()
def encode_pictures(
    config: AutoencoderConfig, run: Path, paths: Sequence[Path]
) -> dict[str, list | np.ndarray]:
    """By the model of a finished run: name (N,), code (N, D), score (N,) of anomaly or the mean
    squared error."""
    model = ConvAutoencoder.from_pretrained(run / MODEL).to(best_device())
    depth = config.data.bit_depth
    samples = [ImageSample(picture_from_file(path, bit_depth=depth)) for path in paths]
    warn_of_squashing([sample.picture for sample in samples], config)
    decoder = partial(decode_sample, config=config.data, read_target=None)
    images, codes, scores = ImageSet(samples, decoder, False, model.device), [], []
    for first in track(range(0, len(images), 256), "encoding"):
        x = to_float(images.take(range(first, min(first + 256, len(images)))))
        codes.append(model.encode(x))
        if config.use == "anomaly":
            scores.append(anomaly_score(model, x, config))
        else:
            scores.append(((model.decode(codes[-1]).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
    columns = {"code": torch.cat(codes).cpu().numpy(), "score": torch.cat(scores).cpu().numpy()}
    return {"name": [str(path) for path in paths], **columns}
