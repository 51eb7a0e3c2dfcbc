"""MNIST: what 32 numbers keep, tell apart and find strange, beside PCA with as many (docs/results.md).

python scripts/results/autoencoder.py [--data FOLDER] [--out runs/results] [--seed 0] [--digits 0 1 ...]
"""

import sys

import numpy as np
import torch
from common import arguments, print_table, train
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainers.autoencoder import PROBED
from trainers.cli import exit_status, silence
from trainers.config.loading import load
from trainers.from_scratch.image_sets import load_images

NOISE = 0.3


def main() -> None:
    digits = {"type": int, "nargs": "+", "default": list(range(10)), "help": "normal classes to learn"}
    chosen = arguments(__doc__, "ylecun/mnist", seed={"type": int, "default": 0}, digits=digits)
    silence()
    table = []

    def ours(config: str, name: str, *overrides: str) -> tuple[dict, float]:
        source = [f"data.dataset_name={chosen.data}", f"seed={chosen.seed}"]
        return train(config, chosen.out / f"{name}_seed{chosen.seed}", *source, *overrides)

    flat, labels, test, truth = pictures(chosen.data)
    baseline = {"linear_probe": probe(PCA(32, random_state=0), flat, labels, test, truth)}
    baseline["raw"] = probe(None, flat, labels, test, truth)
    rng = np.random.default_rng(chosen.seed)
    noisy = np.clip(test + NOISE * rng.standard_normal(test.shape), 0, 1)
    for count in (32, 100):
        pca = PCA(count, random_state=0).fit(flat)
        baseline[f"psnr_{count}"] = psnr(restored(pca, test), test)
        baseline[f"denoise_{count}"] = psnr(restored(pca, noisy), test)
    kept, seconds = ours("autoencoder_mnist", "reconstruct")
    table.append(("PSNR of 32 numbers, dB", kept["psnr"], baseline["psnr_32"], seconds))
    table.append(("linear probe of 32 numbers", kept["linear_probe"], baseline["linear_probe"], seconds))
    table.append(("linear probe of raw pixels", kept["linear_probe"], baseline["raw"], seconds))
    clean, seconds = ours("autoencoder_mnist", "denoise", "use=denoise", f"objective.noise={NOISE}")
    table.append(("noise 0.3 removed, dB (PCA-32)", clean["psnr"], baseline["denoise_32"], seconds))
    table.append(("noise 0.3 removed, dB (PCA-100)", clean["psnr"], baseline["denoise_100"], seconds))
    aurocs, theirs, smooth, spent = [], [], [], []
    for digit in chosen.digits:
        figures, seconds = ours("autoencoder_anomaly", f"anomaly_{digit}", f"data.only_label={digit}")
        pca = PCA(32, random_state=0).fit(flat[labels == digit])
        error = (restored(pca, test) - test).reshape(-1, 1, 28, 28)
        mean = torch.nn.functional.avg_pool2d(torch.from_numpy(error), 3, 1, 1).numpy()
        aurocs.append(figures["auroc"])
        theirs.append(roc_auc_score(truth != digit, (error**2).mean((1, 2, 3))))
        smooth.append(roc_auc_score(truth != digit, (mean**2).mean((1, 2, 3))))
        spent.append(seconds)
        table.append((f"AUROC, normal class {digit}", aurocs[-1], theirs[-1], seconds))
    table.append(("AUROC, mean", np.mean(aurocs), np.mean(theirs), np.sum(spent)))
    table.append(("AUROC, mean, PCA with our averaged error", np.mean(aurocs), np.mean(smooth), np.sum(spent)))
    print_table(["", "ours", "PCA", "training, s"], table)


def pictures(source: str) -> list[np.ndarray]:
    config = load("configs/autoencoder_mnist.yaml", [f"data.dataset_name={source}"])
    parts = []
    for held_out in (False, True):
        images = load_images(config.data, "cpu", held_out)
        parts += [images.pixels.flatten(1).numpy() / np.float32(255), images.labels.numpy()]
    return parts


def probe(pca: PCA | None, flat, labels, test, truth) -> float:
    """The same reader as for our codes, on as many pictures; the components from all. Raw pixels do better unscaled."""
    reader = LogisticRegression(max_iter=500)
    if pca is not None:
        pca.fit(flat)
        flat, test = pca.transform(flat[:PROBED]), pca.transform(test)
        reader = make_pipeline(StandardScaler(), reader)
    return reader.fit(flat[:PROBED], labels[:PROBED]).score(test, truth)


def restored(pca: PCA, x: np.ndarray) -> np.ndarray:
    return np.clip(pca.inverse_transform(pca.transform(x)), 0, 1).astype(np.float32)


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((made - true) ** 2)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
