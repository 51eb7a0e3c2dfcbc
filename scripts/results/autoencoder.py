"""MNIST: what 32 numbers keep, tell apart and find strange, beside PCA with as many
(docs/results.md).

python scripts/results/autoencoder.py [--data FOLDER] [--out runs/results] [--seed 0] [--digits 0 1
...]
"""

import sys

import numpy as np
import torch
from common import parse_arguments, print_table, train
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainers.autoencoder import NUM_PROBE_PICTURES
from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.data.rng import choose_rows
from trainers.from_scratch.image_sets import load_images

NOISE = 0.3


def main() -> None:
    digits = {
        "type": int,
        "nargs": "+",
        "default": list(range(10)),
        "help": "normal classes to learn",
    }
    arguments = parse_arguments(
        __doc__, "ylecun/mnist", seed={"type": int, "default": 0}, digits=digits
    )
    silence_libraries()
    table = []

    def run_trainer(config: str, name: str, *overrides: str) -> tuple[dict, float]:
        source = [f"data.dataset_name={arguments.data}", f"seed={arguments.seed}"]
        return train(config, arguments.out / f"{name}_seed{arguments.seed}", *source, *overrides)

    flat, labels, test, truth = pictures(arguments.data)
    baseline = {"linear_probe": probe(PCA(32, random_state=0), flat, labels, test, truth)}
    baseline["raw"] = probe(None, flat, labels, test, truth)
    rng = np.random.default_rng(arguments.seed)
    noisy = np.clip(test + NOISE * rng.standard_normal(test.shape), 0, 1)
    for count in (32, 100):
        pca = PCA(count, random_state=0).fit(flat)
        baseline[f"psnr_{count}"] = psnr(reconstruct_by_pca(pca, test), test)
        baseline[f"denoise_{count}"] = psnr(reconstruct_by_pca(pca, noisy), test)
    reconstructed, seconds = run_trainer("autoencoder_mnist", "reconstruct")
    table.append(("PSNR of 32 numbers, dB", reconstructed["psnr"], baseline["psnr_32"], seconds))
    table.append(
        (
            "linear probe of 32 numbers",
            reconstructed["linear_probe"],
            baseline["linear_probe"],
            seconds,
        )
    )
    table.append(
        ("linear probe of raw pixels", reconstructed["linear_probe"], baseline["raw"], seconds)
    )
    clean, seconds = run_trainer(
        "autoencoder_mnist", "denoise", "use=denoise", f"objective.noise={NOISE}"
    )
    table.append(("noise 0.3 removed, dB (PCA-32)", clean["psnr"], baseline["denoise_32"], seconds))
    table.append(
        ("noise 0.3 removed, dB (PCA-100)", clean["psnr"], baseline["denoise_100"], seconds)
    )
    aurocs, theirs, smooth, spent = [], [], [], []
    for digit in arguments.digits:
        metrics, seconds = run_trainer(
            "autoencoder_anomaly", f"anomaly_{digit}", f"data.only_label={digit}"
        )
        pca = PCA(32, random_state=0).fit(flat[labels == digit])
        error = (reconstruct_by_pca(pca, test) - test).reshape(-1, 1, 28, 28)
        mean = torch.nn.functional.avg_pool2d(torch.from_numpy(error), 3, 1, 1).numpy()
        aurocs.append(metrics["auroc"])
        theirs.append(roc_auc_score(truth != digit, (error**2).mean((1, 2, 3))))
        smooth.append(roc_auc_score(truth != digit, (mean**2).mean((1, 2, 3))))
        spent.append(seconds)
        table.append((f"AUROC, normal class {digit}", aurocs[-1], theirs[-1], seconds))
    table.append(("AUROC, mean", np.mean(aurocs), np.mean(theirs), np.sum(spent)))
    table.append(
        (
            "AUROC, mean, PCA with our averaged error",
            np.mean(aurocs),
            np.mean(smooth),
            np.sum(spent),
        )
    )
    print_table(["", "ours", "PCA", "training, s"], table)


def pictures(source: str) -> list[np.ndarray]:
    config = load_config("configs/autoencoder_mnist.yaml", [f"data.dataset_name={source}"])
    parts = []
    for held_out in (False, True):
        images = load_images(config.data, "cpu", held_out)
        parts += [images.pixels.flatten(1).numpy() / np.float32(255), images.labels.numpy()]
    return parts


def probe(pca: PCA | None, flat, labels, test, truth) -> float:
    """The same reader as for our codes, on as many pictures drawn by chance; the components from
    all. Raw pixels do better unscaled."""
    reader = LogisticRegression(max_iter=500)
    if pca is not None:
        pca.fit(flat)
        flat, test = pca.transform(flat), pca.transform(test)
        reader = make_pipeline(StandardScaler(), reader)
    rows = choose_rows(0, len(flat), NUM_PROBE_PICTURES)
    return reader.fit(flat[rows], labels[rows]).score(test, truth)


def reconstruct_by_pca(pca: PCA, x: np.ndarray) -> np.ndarray:
    return np.clip(pca.inverse_transform(pca.transform(x)), 0, 1).astype(np.float32)


def psnr(generated: np.ndarray, true: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((generated - true) ** 2)))


if __name__ == "__main__":
    sys.exit(run_main(main))
