"""MNIST: what 32 numbers keep, tell apart and find strange, beside PCA with as many.

python scripts/results/autoencoder.py [--data FOLDER] [--out runs/results] [--seed 0]
    [--digits 0 1 ...]

See docs/results.md.
"""

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from common import Metrics, print_table, results_parser, train
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
CODE = 32  # numbers that a picture becomes

Row = tuple[str, float, float, float]  # what is measured, ours, PCA's, seconds of training


@dataclass
class Digits:
    """Pictures (N, 784) in 0..1 and their labels (N,), to train on and held out."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def parse_arguments() -> argparse.Namespace:
    parser = results_parser(__doc__, "ylecun/mnist")
    parser.add_argument("--seed", type=int, default=0, help="The seed of our runs.")
    help = "The digits that are learned as normal, each by a run."
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)), help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    digits = load_digits(arguments.data)
    rows = [*code_rows(arguments, digits), *anomaly_rows(arguments, digits)]
    print_table(["", "ours", "PCA", "training, s"], rows)


def load_digits(source: str) -> Digits:
    config = load_config("configs/autoencoder_mnist.yaml", [f"data.dataset_name={source}"])
    arrays = []
    for held_out in (False, True):
        images = load_images(config.data, "cpu", held_out)
        arrays += [images.pixels.flatten(1).numpy() / np.float32(255), images.labels.numpy()]
    return Digits(*arrays)


def run_trainer(
    arguments: argparse.Namespace, config: str, name: str, *overrides: str
) -> tuple[Metrics, float]:
    source = [f"data.dataset_name={arguments.data}", f"seed={arguments.seed}"]
    return train(config, arguments.out / f"{name}_seed{arguments.seed}", *source, *overrides)


def code_rows(arguments: argparse.Namespace, digits: Digits) -> list[Row]:
    """How well codes give pictures back, tell digits apart, and leave noise out."""
    test = digits.test
    rng = np.random.default_rng(arguments.seed)
    noisy = np.clip(test + NOISE * rng.standard_normal(test.shape), 0, 1)
    pcas = {count: PCA(count, random_state=0).fit(digits.train) for count in (CODE, 100)}
    probes = [probe(PCA(CODE, random_state=0), digits), probe(None, digits)]
    config = "autoencoder_mnist"
    ours, seconds = run_trainer(arguments, config, "reconstruct")
    psnr_of_codes = psnr(reconstruct(pcas[CODE], test), test)
    rows = [
        (f"PSNR of {CODE} numbers, dB", ours["psnr"], psnr_of_codes, seconds),
        (f"linear probe of {CODE} numbers", ours["linear_probe"], probes[0], seconds),
        ("linear probe of raw pixels", ours["linear_probe"], probes[1], seconds),
    ]
    options = ["use=denoise", f"objective.noise={NOISE}"]
    ours, seconds = run_trainer(arguments, config, "denoise", *options)
    for count, pca in pcas.items():
        name = f"noise {NOISE} removed, dB (PCA-{count})"
        rows.append((name, ours["psnr"], psnr(reconstruct(pca, noisy), test), seconds))
    return rows


def anomaly_rows(arguments: argparse.Namespace, digits: Digits) -> list[Row]:
    """How well each digit is told from all others by whom has seen that digit alone."""
    rows, smoothed = [], []
    for digit in arguments.digits:
        only = f"data.only_label={digit}"
        ours, seconds = run_trainer(arguments, "autoencoder_anomaly", f"anomaly_{digit}", only)
        pca = PCA(CODE, random_state=0).fit(digits.train[digits.train_labels == digit])
        error = (reconstruct(pca, digits.test) - digits.test).reshape(-1, 1, 28, 28)
        mean = torch.nn.functional.avg_pool2d(torch.from_numpy(error), 3, 1, 1).numpy()
        is_strange = digits.test_labels != digit
        theirs = float(roc_auc_score(is_strange, (error**2).mean((1, 2, 3))))
        smoothed.append(float(roc_auc_score(is_strange, (mean**2).mean((1, 2, 3)))))
        rows.append((f"AUROC, normal class {digit}", ours["auroc"], theirs, seconds))
    _, ours, theirs, seconds = zip(*rows, strict=True)
    for name, other in (("", theirs), (", PCA with our averaged error", smoothed)):
        means = float(np.mean(ours)), float(np.mean(other))
        rows.append((f"AUROC, mean{name}", *means, float(np.sum(seconds))))
    return rows


def probe(pca: PCA | None, digits: Digits) -> float:
    """The accuracy of the same reader as for our codes, on as many pictures drawn by chance.

    The components are of all pictures. Raw pixels do better unscaled.
    """
    reader = LogisticRegression(max_iter=500)
    train, test = digits.train, digits.test
    if pca is not None:
        pca.fit(train)
        train, test = pca.transform(train), pca.transform(test)
        reader = make_pipeline(StandardScaler(), reader)
    rows = choose_rows(0, len(train), NUM_PROBE_PICTURES)
    reader.fit(train[rows], digits.train_labels[rows])
    return float(reader.score(test, digits.test_labels))


def reconstruct(pca: PCA, x: np.ndarray) -> np.ndarray:
    return np.clip(pca.inverse_transform(pca.transform(x)), 0, 1).astype(np.float32)


def psnr(generated: np.ndarray, true: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((generated - true) ** 2)))


if __name__ == "__main__":
    sys.exit(run_main(main))
