"""MNIST: our GAN and the DCGAN tutorial's recipe, the same seconds each, by the same judge.

python scripts/results/gan.py [--data FOLDER] [--out runs/results] [--seeds 0 1 2] [--steps 2000]

The tutorial's recipe (pytorch.org, "DCGAN Tutorial"): batch norm in both players, binary
cross-entropy, Adam at 2e-4 with betas 0.5 and 0.999, batches of 128, z of 100 numbers, weights from
N(0, 0.02); at 28 pixels instead of 64, its pictures in memory. With its own width, 64, and with
ours. See docs/results.md.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from common import (
    Metrics,
    batches_for_seconds,
    print_table,
    read_or_compute,
    results_parser,
    train,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainers.cli import run_main, silence_libraries
from trainers.config.gan import GanConfig
from trainers.config.loading import load_config
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.from_scratch.balance import FailureWarning, class_balance
from trainers.from_scratch.classifier import classifier_features, train_classifier
from trainers.from_scratch.image_sets import load_images
from trainers.metrics.image_quality import distribution_metrics

TUTORIAL_WIDTH = 64
COLUMNS = {
    "FID": "fid",
    "KID": "kid",
    "precision": "precision",
    "recall": "recall",
    "digits": "modes",
    "least share": "least_share",
    "most share": "most_share",
}
UNSTABLE = [
    "objective.loss=non_saturating",
    "objective.r1=0",
    "optimizer.learning_rate=0.02",
    "optimizer.betas=[0.9,0.999]",
    "train.ema_decay=null",
    "train.max_grad_norm=1e6",
    "train.max_train_steps=300",
]


def parse_arguments() -> argparse.Namespace:
    parser = results_parser(__doc__, "ylecun/mnist")
    help = "The seeds, each of a run of ours and of two of the tutorial's recipe."
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=help)
    parser.add_argument("--steps", type=int, default=2000, help="Steps of our runs.")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    source = f"data.dataset_name={arguments.data}"
    rows = compare(arguments, source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics, seconds = train("gan_mnist", arguments.out / "gan_unstable", source, *UNSTABLE)
    rows.append(make_row("unstable on purpose", 0, seconds, metrics))
    print_table(["", "seed", "seconds", *COLUMNS], rows)
    print("warnings of the unstable run:")
    for warning in caught:
        if warning.category is FailureWarning:
            print(f"  {warning.message}")


def compare(arguments: argparse.Namespace, source: str) -> list[list]:
    """The rows of ours and of the tutorial's recipe, by the same judge."""
    config = load_config("configs/gan_mnist.yaml", [source])
    tutorial, rows = Tutorial(config), []
    for seed in arguments.seeds:
        options = [source, f"seed={seed}", f"train.max_train_steps={arguments.steps}"]
        metrics, seconds = train("gan_mnist", arguments.out / f"gan_seed{seed}", *options)
        rows.append(make_row("ours", seed, seconds, metrics))
        for width in (TUTORIAL_WIDTH, config.model.width):
            path = arguments.out / f"dcgan{width}_seed{seed}.json"
            measure = partial(tutorial.measure, width, seed, seconds, path.with_suffix(".png"))
            metrics = read_or_compute(path, measure)
            rows.append(make_row(f"tutorial, width {width}", seed, seconds, metrics))
    return rows


def make_row(name: str, seed: int, seconds: float, metrics: Metrics) -> list:
    return [name, seed, round(seconds), *(metrics[key] for key in COLUMNS.values())]


def make_generator(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(100, 2 * width, 7, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(True),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def make_discriminator(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 1, 7, bias=False),
        nn.Flatten(0),
    )


def initialize(module: nn.Module) -> None:
    """Draw the weights as the tutorial does."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


class Tutorial:
    """The tutorial's recipe on the pictures of a config, and its judge."""

    def __init__(self, config: GanConfig) -> None:
        self.images, self.held_out = (
            load_images(config.data, "cpu", held_out) for held_out in (False, True)
        )
        self.classifier = train_classifier(self.images, config.data)
        _, self.features = classifier_features(self.classifier, self.held_out)

    def measure(self, width: int, seed: int, seconds: float, grid: Path) -> Metrics:
        """The metrics after so many seconds of training; some pictures are written to `grid`."""
        count = len(self.held_out)
        generated = train_tutorial(self.images.pixels, width, seed, seconds, count)
        write_grid([("made", to_pil(generated[:10]))], grid, tile=64)
        true = to_float(self.held_out.take(range(count)))
        balance = class_balance(generated, self.classifier)
        return distribution_metrics(generated, true, self.features) | balance


def train_tutorial(pixels: Tensor, width: int, seed: int, seconds: float, count: int) -> Tensor:
    """Pictures (count, 1, 28, 28) made after so many seconds of training."""
    torch.manual_seed(seed)
    players = make_generator(width), make_discriminator(width)
    generator, discriminator = players
    for player in players:
        player.apply(initialize)
    generator_adam, discriminator_adam = (
        torch.optim.Adam(player.parameters(), 2e-4, betas=(0.5, 0.999)) for player in players
    )
    loss = nn.BCEWithLogitsLoss()
    loader = DataLoader(TensorDataset(pixels), 128, shuffle=True, drop_last=True)
    for (batch,) in batches_for_seconds(seconds, loader):
        real = to_float(batch)
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        discriminator_adam.zero_grad()
        loss(discriminator(real), ones).backward()
        fake = generator(torch.randn(len(real), 100, 1, 1))
        loss(discriminator(fake.detach()), zeros).backward()
        discriminator_adam.step()
        generator_adam.zero_grad()
        loss(discriminator(fake), ones).backward()
        generator_adam.step()
    generator.eval()
    with torch.no_grad():
        parts = [generator(torch.randn(500, 100, 1, 1)) for _ in range(0, count, 500)]
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(run_main(main))
