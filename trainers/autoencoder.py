"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al. 2008), anomalies."""

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
from trainers.data.imaging import floats, pictures, write_grid
from trainers.data.rng import Draws
from trainers.distributed.accelerator import best_device
from trainers.from_scratch.image_sets import Images, Sample, decode, found
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import SHOWN, FromScratch, shape
from trainers.metrics.image_quality import psnr, ssim

PROBED = 20000  # training pictures that the linear probe is fitted on


PLOTTED = 2000  # test pictures in the plot of the codes


PATCH = 4  # side of what is hidden, pixels


GUESSES = 8  # hidings that an anomaly's score is the mean of


class Autoencoder(FromScratch):
    """Learns to give back what it is shown through a code of `latent_dim` numbers."""

    saved, tag = "autoencoder", "image-feature-extraction"

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.add("autoencoder", ConvAutoencoder(config.data.channels, config.data.resolution, **dict(config.model)))

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        """The mean squared error of what comes out and, when variational, the divergence from the unit Gaussian."""
        x, model = floats(batch["pixels"]), self.config.model
        seen = spoil(x, self.config, rng)
        eps = rng.normal((len(x), model.latent_dim)) if model.variational else None
        y, mean, logvar = self.players["autoencoder"].module(seen, eps)
        loss = (y - x).square().mean()
        if model.variational:
            loss = loss + self.config.objective.kl_weight * (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        yield "autoencoder", loss

    @torch.no_grad()
    def apply(self, images: Images, most: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first pictures, what is shown of them (always the same), what comes out, and their own codes."""
        count, parts = len(images) if most is None else min(most, len(images)), []
        for first in range(0, count, 1000):
            rows = range(first, min(first + 1000, count))
            x = floats(images.take(rows))
            seen = spoil(x, self.config, Draws(self.config.seed, -1, rows, self.device))
            out = self.model(x if self.config.use == "anomaly" else seen)[0].clamp(-1, 1)
            parts.append((x, seen, out, self.model.encode(x)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def sample(self, folder: Path) -> None:
        true, seen, out, codes = self.apply(self.test or self.train, SHOWN)
        rows = [("true", true), *([("shown", seen)] if self.config.use != "reconstruct" else []), ("made", out)]
        way = torch.linspace(0, 1, SHOWN, device=self.device)[:, None]
        with torch.no_grad():
            walks = [self.model.decode(a + way * (b - a)) for a, b in zip(codes[:-1:3], codes[1::3], strict=False)]
            fresh = self.model.decode(Draws(self.config.seed, -1, range(SHOWN), self.device).normal(codes.shape))
        rows += [("from one code to another", walk) for walk in walks]
        rows += [("from random codes", fresh)] if self.config.model.variational else []
        write_grid([(title, pictures(x)) for title, x in rows], folder / "grid.png", tile=64)

    def example(self) -> str:
        return f"codes = model.encode(x)  # x: {shape(self.config)}; model.decode(codes) gives pictures"

    def measure(self) -> dict[str, float | str]:
        """psnr (dB) and ssim of what comes out; linear_probe: accuracy of a linear reader of the codes; for anomalies
        auroc: of their score, the learnt class against all others."""
        x, _, out, codes = self.apply(self.test)
        truth, labelled = self.test.labels, self.config.data.label_column is not None
        if labelled:
            plot_codes(codes[:PLOTTED], truth[:PLOTTED], self.config.output_dir / "samples" / "final" / "codes.png")
        if self.config.use == "anomaly" and labelled:
            from sklearn.metrics import roc_auc_score

            own = truth == self.config.data.only_label
            score = torch.cat([anomaly(self.model, part, self.config) for part in x.split(1000)])
            auroc = float(roc_auc_score(~own.cpu(), score.cpu()))
            return {"auroc": auroc, "psnr": psnr(out[own], x[own]), "ssim": ssim(out[own], x[own])}
        figures = {"psnr": psnr(out, x), "ssim": ssim(out, x)}
        return figures | ({"linear_probe": self.probe(codes, truth)} if labelled else {})

    def probe(self, codes: Tensor, truth: Tensor) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on training pictures."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known = self.apply(self.train, PROBED)[3]
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(known.cpu().numpy(), self.train.labels[: len(known)].cpu().numpy())
        return float(reader.score(codes.cpu().numpy(), truth.cpu().numpy()))


def spoil(x: Tensor, config: AutoencoderConfig, rng: Draws) -> Tensor:
    """What the model is shown: noise in units of the full range to denoise, hidden patches to find anomalies."""
    if config.use == "denoise":
        return (x + 2 * config.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
    if config.use == "anomaly":
        side = -(-x.shape[-1] // PATCH)
        kept = rng.normal((len(x), 1, side, side)) > torch.special.ndtri(torch.tensor(config.objective.hidden))
        kept = F.interpolate(kept.float(), scale_factor=PATCH)[..., : x.shape[-1], : x.shape[-1]]
        return torch.where(kept > 0, x, -1)
    return x


@torch.no_grad()
def anomaly(model: ConvAutoencoder, x: Tensor, config: AutoencoderConfig) -> Tensor:
    """(B,) how badly hidden patches are guessed (Zavrtanik et al. 2021, RIAD): the squared error of the mean guess.

    Errors are averaged over 3 x 3 pixels first: by how much a stroke's edge is off is no anomaly.
    """
    draws = [Draws(config.seed, -2 - k, [0] * len(x), x.device) for k in range(GUESSES)]
    error = sum(model(spoil(x, config, rng))[0].clamp(-1, 1) for rng in draws) / GUESSES - x
    return (F.avg_pool2d(error, 3, 1, 1) / 2).square().mean((1, 2, 3))


@torch.no_grad()
def encode(config: AutoencoderConfig, run: Path, paths: Sequence[Path]) -> dict[str, list | np.ndarray]:
    """By the model of a finished run: name (N,), code (N, D), score (N,) of anomaly or the mean squared error."""
    model = ConvAutoencoder.from_pretrained(run / "model").to(best_device())
    samples, reader = [Sample(found(path)) for path in paths], partial(decode, config=config.data, target=None)
    images, codes, scores = Images(samples, reader, False, model.device), [], []
    for first in tqdm(range(0, len(images), 256), unit="batch"):
        x = floats(images.take(range(first, min(first + 256, len(images)))))
        codes.append(model.encode(x))
        if config.use == "anomaly":
            scores.append(anomaly(model, x, config))
        else:
            scores.append(((model.decode(codes[-1]).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
    columns = {"code": torch.cat(codes).cpu().numpy(), "score": torch.cat(scores).cpu().numpy()}
    return {"name": [str(path) for path in paths], **columns}


def plot_codes(codes: Tensor, labels: Tensor, path: Path) -> None:
    """The codes (N, D) in the plane by t-SNE (van der Maaten and Hinton 2008), or as they are if D = 2, by class."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    points = codes.cpu().numpy()
    if points.shape[1] != 2:
        points = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
    figure = Figure((7, 7), layout="tight")
    axes, classes = figure.subplots(), labels.cpu().numpy()
    for label in sorted(set(classes.tolist())):
        axes.scatter(*points[classes == label].T, s=6, label=str(label), color=f"C{label}" if label < 10 else None)
    axes.legend(title="class", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[], title="codes of test pictures")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
