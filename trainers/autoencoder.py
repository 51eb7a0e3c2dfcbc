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
from tqdm.auto import tqdm

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.data.pictures import picture_from_file
from trainers.data.rng import SampleRng
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.codes import anomaly_score, corrupt, plot_codes
from trainers.from_scratch.image_sets import ImageSample, ImageSet, decode_sample
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask, describe_input
from trainers.metrics.image_quality import psnr, ssim

NUM_PROBE_PICTURES = 20000  # training pictures that the linear probe is fitted on
NUM_PLOT_PICTURES = 2000  # test pictures in the plot of the codes


class Autoencoder(FromScratchTask):
    """Learns to give back what it is shown through a code of `latent_dim` numbers."""

    saved_player, pipeline_tag = "autoencoder", "image-feature-extraction"

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
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

    @torch.no_grad()
    def reconstruct(
        self, images: ImageSet, limit: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first pictures, what is shown of them (always the same), what comes out, and their
        own codes."""
        count, parts = len(images) if limit is None else min(limit, len(images)), []
        for first in range(0, count, 1000):
            rows = range(first, min(first + 1000, count))
            x = to_float(images.take(rows))
            corrupted = corrupt(x, self.config, SampleRng(self.config.seed, -1, rows, self.device))
            output = self.model(x if self.config.use == "anomaly" else corrupted)[0].clamp(-1, 1)
            parts.append((x, corrupted, output, self.model.encode(x)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def sample(self, folder: Path) -> None:
        true, corrupted, output, codes = self.reconstruct(
            self.test_images or self.train_images, GRID_COLUMNS
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
        write_grid([(title, to_pil(x)) for title, x in rows], folder / "grid.png", tile=64)

    def usage_example(self) -> str:
        return (
            f"codes = model.encode(x)  # x: {describe_input(self.config)}; "
            f"model.decode(codes) gives pictures"
        )

    def evaluate(self) -> dict[str, float | str]:
        """psnr (dB) and ssim of what comes out; linear_probe: accuracy of a linear reader of the
        codes; for anomalies
        auroc: of their score, the learnt class against all others."""
        x, _, output, codes = self.reconstruct(self.test_images)
        truth, has_labels = self.test_images.labels, self.config.data.label_column is not None
        if has_labels:
            plot_codes(
                codes[:NUM_PLOT_PICTURES],
                truth[:NUM_PLOT_PICTURES],
                self.config.output_dir / "samples" / "final" / "codes.png",
            )
        if self.config.use == "anomaly" and has_labels:
            from sklearn.metrics import roc_auc_score

            is_normal = truth == self.config.data.only_label
            score = torch.cat(
                [anomaly_score(self.model, part, self.config) for part in x.split(1000)]
            )
            auroc = float(roc_auc_score(~is_normal.cpu(), score.cpu()))
            return {
                "auroc": auroc,
                "psnr": psnr(output[is_normal], x[is_normal]),
                "ssim": ssim(output[is_normal], x[is_normal]),
            }
        metrics = {"psnr": psnr(output, x), "ssim": ssim(output, x)}
        return metrics | ({"linear_probe": self.linear_probe(codes, truth)} if has_labels else {})

    def linear_probe(self, codes: Tensor, truth: Tensor) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on training pictures."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        train_codes = self.reconstruct(self.train_images, NUM_PROBE_PICTURES)[3]
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(
            train_codes.cpu().numpy(), self.train_images.labels[: len(train_codes)].cpu().numpy()
        )
        return float(reader.score(codes.cpu().numpy(), truth.cpu().numpy()))


@torch.no_grad()
def encode_pictures(
    config: AutoencoderConfig, run: Path, paths: Sequence[Path]
) -> dict[str, list | np.ndarray]:
    """By the model of a finished run: name (N,), code (N, D), score (N,) of anomaly or the mean
    squared error."""
    model = ConvAutoencoder.from_pretrained(run / "model").to(best_device())
    depth = config.data.bit_depth
    samples, decoder = (
        [ImageSample(picture_from_file(path, bit_depth=depth)) for path in paths],
        partial(decode_sample, config=config.data, read_target=None),
    )
    images, codes, scores = ImageSet(samples, decoder, False, model.device), [], []
    for first in tqdm(range(0, len(images), 256), unit="batch"):
        x = to_float(images.take(range(first, min(first + 256, len(images)))))
        codes.append(model.encode(x))
        if config.use == "anomaly":
            scores.append(anomaly_score(model, x, config))
        else:
            scores.append(((model.decode(codes[-1]).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
    columns = {"code": torch.cat(codes).cpu().numpy(), "score": torch.cat(scores).cpu().numpy()}
    return {"name": [str(path) for path in paths], **columns}
