"""Autoencoder: few numbers per picture (Hinton and Salakhutdinov 2006), denoising (Vincent et al. 2008), anomalies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .draws import Draws, mix
from .images import Batches, Images, load_images
from .loop import Player
from .nets import ConvAutoencoder
from .observers import averaged, write_grid
from .optim import EMA, make_optimizer
from .sections import AutoencoderConfig

SHOWN = 10  # pictures in a grid


class Autoencoder:
    """The task of the loop. `test` may be None; its pictures are only measured on, never learnt from."""

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator, train: Images, test: Images | None) -> None:
        self.config, self.accelerator, self.train, self.test = config, accelerator, train, test
        torch.manual_seed(mix(config.seed, "init"))
        module = ConvAutoencoder(config.data.channels, config.data.resolution, **config.model.model_dump())
        group = {"params": list(module.parameters()), "lr": config.optimizer.learning_rate}
        optimizer = make_optimizer(config.optimizer, [group])
        ema = EMA(module, config.train.ema_decay) if config.train.ema_decay else None
        self.players = {"autoencoder": Player(*accelerator.prepare(module, optimizer), ema)}

    @property
    def module(self) -> ConvAutoencoder:
        return self.accelerator.unwrap_model(self.players["autoencoder"].module)

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        """batch["x"] (B, C, S, S): the mean squared error of what comes out."""
        x = batch["x"]
        y = self.players["autoencoder"].module(self.spoil(x, rng))
        yield "autoencoder", (y - x).square().mean()

    def spoil(self, x: Tensor, rng: Draws) -> Tensor:
        """What the model is shown: noise of `config.noise` in units of the full range, cut to it, when it denoises."""
        if self.config.use != "denoise":
            return x
        return (x + 2 * self.config.noise * rng.normal(x.shape)).clamp(-1, 1)

    @torch.no_grad()
    def apply(self, images: Images, rows: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some rows, what is shown of them, what comes out, and the codes; the noise of a row is always the same."""
        module, device = self.module.eval(), self.accelerator.device
        x = images.floats(torch.tensor(rows, device=device))
        seen = self.spoil(x, Draws(self.config.seed, -1, rows, device))
        codes = module.encode(seen)
        out = module.decode(codes)
        module.train()
        return x, seen, out, codes

    def sample(self, folder: Path) -> None:
        images = self.train if self.test is None else self.test
        rows = range(min(SHOWN, len(images)))
        true, seen, out, _ = self.apply(images, rows)
        shown = [("true", true), *([("shown", seen)] if self.config.use == "denoise" else []), ("made", out)]
        write_grid([(title, pictures(x)) for title, x in shown], folder / "grid.png", tile=64)

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder / "model")

    def finish(self) -> None:
        """Save, measure on the test split, show."""
        folder = self.config.output_dir
        with averaged(self):
            self.save(folder)
            self.sample(folder / "samples" / "final")
            if self.test is not None:
                figures = self.measure()
                (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
                self.accelerator.print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def measure(self) -> dict[str, float]:
        """On the test split, `psnr`: of what comes out, dB, pictures in 0..1; `linear_probe`: accuracy of a linear
        reader of the codes; for anomalies `auroc`: of the squared error, the learnt class against all others."""
        error, codes = [], []
        for first in range(0, len(self.test), 1000):
            rows = range(first, min(first + 1000, len(self.test)))
            x, _, out, code = self.apply(self.test, rows)
            error.append(((out.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3)).cpu())
            codes.append(code.cpu())
        error, truth = torch.cat(error), self.test.labels.cpu()
        own = truth == self.config.data.only_label
        if self.config.use == "anomaly":
            from sklearn.metrics import roc_auc_score

            return {"auroc": float(roc_auc_score(~own, error)), "psnr": psnr(error[own])}
        figures = {"psnr": psnr(error)}
        if self.config.data.label_column is not None:
            figures["linear_probe"] = self.probe(torch.cat(codes), truth)
        return figures

    def probe(self, codes: Tensor, truth: Tensor, most: int = 20000) -> float:
        """Accuracy of logistic regression on standardised codes, fitted on up to `most` training pictures."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        count = min(most, len(self.train))
        known = [self.apply(self.train, range(i, min(i + 1000, count)))[3].cpu() for i in range(0, count, 1000)]
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        reader.fit(torch.cat(known).numpy(), self.train.labels[:count].cpu().numpy())
        return float(reader.score(codes.numpy(), truth.numpy()))


def psnr(error: Tensor) -> float:
    """Of mean squared errors (N,): dB, the mean taken before the logarithm."""
    return float(-10 * torch.log10(error.mean()))


def pictures(x: Tensor) -> list[Image.Image]:
    """(B, C, S, S) in [-1, 1] to RGB."""
    array = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.broadcast_to(a, (*a.shape[:2], 3)).copy()) for a in array]


def build(config: AutoencoderConfig, accelerator: Accelerator) -> tuple[Autoencoder, Batches, str]:
    data, train = config.data, config.train
    images = load_images(data, data.train_split).to(accelerator.device)
    measured = data.image_dir is None and data.test_split is not None
    test = load_images(data.model_copy(update={"only_label": None}), data.test_split) if measured else None
    task = Autoencoder(config, accelerator, images, test.to(accelerator.device) if test else None)
    batches = Batches(
        images,
        config.seed,
        train.train_batch_size,
        train.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return task, batches, images.digest
