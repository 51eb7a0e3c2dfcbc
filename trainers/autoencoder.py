"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al. 2008), anomalies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from .draws import Draws
from .from_scratch import SHOWN, FromScratch, shape
from .images import Images, floats, pictures
from .metrics import psnr, ssim
from .nets import ConvAutoencoder
from .observers import write_grid
from .sections import AutoencoderConfig

PROBED = 20000  # training pictures that the linear probe is fitted on
PLOTTED = 2000  # test pictures in the plot of the codes


class Autoencoder(FromScratch):
    """Learns to give back what it is shown through a code of `latent_dim` numbers."""

    saved, tag = "autoencoder", "image-feature-extraction"

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.add("autoencoder", ConvAutoencoder(config.data.channels, config.data.resolution, **dict(config.model)))

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        """The mean squared error of what comes out and, when variational, the divergence from the unit Gaussian."""
        x, model = floats(batch["pixels"]), self.config.model
        seen = self.spoil(x, rng)
        eps = rng.normal((len(x), model.latent_dim)) if model.variational else None
        y, mean, logvar = self.players["autoencoder"].module(seen, eps)
        loss = (y - x).square().mean()
        if model.variational:
            loss = loss + self.config.objective.kl_weight * (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        yield "autoencoder", loss

    def spoil(self, x: Tensor, rng: Draws) -> Tensor:
        """What the model is shown: noise of `objective.noise` in units of the full range, unless it reconstructs."""
        if self.config.use == "reconstruct":
            return x
        return (x + 2 * self.config.objective.noise * rng.normal(x.shape)).clamp(-1, 1)

    @torch.no_grad()
    def apply(self, images: Images, rows: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows, what is shown of them, what comes out, and the codes; a row's noise is always the same.

        Anomalies are sought in pictures without noise.
        """
        x = floats(images.take(rows))
        seen = self.spoil(x, Draws(self.config.seed, -1, rows, self.device)) if self.config.use == "denoise" else x
        codes = self.model.encode(seen)
        return x, seen, self.model.decode(codes).clamp(-1, 1), codes

    def apply_all(self, images: Images, most: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        count = len(images) if most is None else min(most, len(images))
        for first in range(0, count, 1000):
            yield self.apply(images, range(first, min(first + 1000, count)))

    def sample(self, folder: Path) -> None:
        images = self.test or self.train
        true, seen, out, codes = self.apply(images, range(min(SHOWN, len(images))))
        rows = [("true", true), *([("shown", seen)] if self.config.use == "denoise" else []), ("made", out)]
        way = torch.linspace(0, 1, SHOWN, device=self.device)[:, None]
        with torch.no_grad():
            between = [
                self.model.decode(codes[i] + way * (codes[i + 1] - codes[i])) for i in range(0, len(codes) - 1, 3)
            ]
        rows += [("from one code to another", x) for x in between]
        write_grid([(title, pictures(x)) for title, x in rows], folder / "grid.png", tile=64)

    def example(self) -> str:
        return f"codes = model.encode(x)  # x: {shape(self.config)}; model.decode(codes) gives pictures"

    def measure(self) -> dict[str, float | str]:
        """psnr (dB) and ssim of what comes out; linear_probe: accuracy of a linear reader of the codes; for anomalies
        auroc: of the squared error, the learnt class against all others."""
        parts = [(x, out, codes) for x, _, out, codes in self.apply_all(self.test)]
        x, out, codes = (torch.cat(part) for part in zip(*parts, strict=True))
        truth, labelled = self.test.labels, self.config.data.label_column is not None
        if labelled:
            from .plots import plot_codes

            plot_codes(codes[:PLOTTED], truth[:PLOTTED], self.config.output_dir / "samples" / "final" / "codes.png")
        if self.config.use == "anomaly":
            from sklearn.metrics import roc_auc_score

            own = truth == self.config.data.only_label
            error = (out - x).square().mean(dim=(1, 2, 3))
            auroc = float(roc_auc_score(~own.cpu(), error.cpu()))
            return {"auroc": auroc, "psnr": psnr(out[own], x[own]), "ssim": ssim(out[own], x[own])}
        figures = {"psnr": psnr(out, x), "ssim": ssim(out, x)}
        return figures | ({"linear_probe": self.probe(codes, truth)} if labelled else {})

    def probe(self, codes: Tensor, truth: Tensor) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on training pictures."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known = torch.cat([codes for *_, codes in self.apply_all(self.train, PROBED)])
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(known.cpu().numpy(), self.train.labels[: len(known)].cpu().numpy())
        return float(reader.score(codes.cpu().numpy(), truth.cpu().numpy()))
