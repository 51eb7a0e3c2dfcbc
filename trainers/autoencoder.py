"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al.
2008), anomalies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.data.rng import SampleRng
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.image_sets import ImageSample, ImageSet, decode_sample, picture_from_file
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import GRID_COLUMNS, FromScratchTask, describe_input
from trainers.metrics.image_quality import psnr, ssim

NUM_PROBE_PICTURES = 20000  # training pictures that the linear probe is fitted on


NUM_PLOT_PICTURES = 2000  # test pictures in the plot of the codes


PATCH_SIZE = 4  # side of what is hidden, pixels


NUM_MASKINGS = 8  # hidings that an anomaly's score is the mean of


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


def corrupt(x: Tensor, config: AutoencoderConfig, rng: SampleRng) -> Tensor:
    """What the model is shown: noise in units of the full range to denoise, hidden patches to find
    anomalies."""
    if config.use == "denoise":
        return (x + 2 * config.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
    if config.use == "anomaly":
        side = -(-x.shape[-1] // PATCH_SIZE)
        visible = rng.normal((len(x), 1, side, side)) > torch.special.ndtri(
            torch.tensor(config.objective.hidden)
        )
        visible = F.interpolate(visible.float(), scale_factor=PATCH_SIZE)[
            ..., : x.shape[-1], : x.shape[-1]
        ]
        return torch.where(visible > 0, x, -1)
    return x


@torch.no_grad()
def anomaly_score(model: ConvAutoencoder, x: Tensor, config: AutoencoderConfig) -> Tensor:
    """(B,) how badly hidden patches are guessed (Zavrtanik et al. 2021, RIAD): the squared error of
    the mean guess.

    Errors are averaged over 3 x 3 pixels first: by how much a stroke's edge is off is no anomaly.
    """
    rngs = [SampleRng(config.seed, -2 - k, [0] * len(x), x.device) for k in range(NUM_MASKINGS)]
    error = sum(model(corrupt(x, config, rng))[0].clamp(-1, 1) for rng in rngs) / NUM_MASKINGS - x
    return (F.avg_pool2d(error, 3, 1, 1) / 2).square().mean((1, 2, 3))


@torch.no_grad()
def encode_pictures(
    config: AutoencoderConfig, run: Path, paths: Sequence[Path]
) -> dict[str, list | np.ndarray]:
    """By the model of a finished run: name (N,), code (N, D), score (N,) of anomaly or the mean
    squared error."""
    model = ConvAutoencoder.from_pretrained(run / "model").to(best_device())
    samples, decoder = (
        [ImageSample(picture_from_file(path)) for path in paths],
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


def plot_codes(codes: Tensor, labels: Tensor, path: Path) -> None:
    """The codes (N, D) in the plane by t-SNE (van der Maaten and Hinton 2008), or as they are if D
    = 2, by class."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    points = codes.cpu().numpy()
    if points.shape[1] != 2:
        points = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(
            points
        )
    figure = Figure((7, 7), layout="tight")
    axes, classes = figure.subplots(), labels.cpu().numpy()
    for label in sorted(set(classes.tolist())):
        axes.scatter(
            *points[classes == label].T,
            s=6,
            label=str(label),
            color=f"C{label}" if label < 10 else None,
        )
    axes.legend(title="class", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[], title="codes of test pictures")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
