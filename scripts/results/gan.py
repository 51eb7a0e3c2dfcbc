"""MNIST: our GAN and the DCGAN tutorial's recipe, the same seconds each, by the same judge
(docs/results.md).

python scripts/results/gan.py [--data FOLDER] [--out runs/results] [--seeds 0 1 2] [--steps 2000]

The tutorial's recipe (pytorch.org, "DCGAN Tutorial"): batch norm in both players, binary
cross-entropy, Adam at 2e-4 with betas 0.5 and 0.999, batches of 128, z of 100 numbers, weights from
N(0, 0.02); at 28 pixels instead of 64, its pictures in memory. With its own width, 64, and with
ours.
"""

import json
import sys
import warnings

import torch
from common import batches_for_seconds, parse_arguments, print_table, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.data.imaging import to_float, to_pil, write_grid
from trainers.from_scratch.balance import FailureWarning, class_balance
from trainers.from_scratch.classifier import classifier_features, train_classifier
from trainers.from_scratch.image_sets import load_images
from trainers.metrics.image_quality import distribution_metrics


def main() -> None:
    seeds = {"type": int, "nargs": "+", "default": [0, 1, 2]}
    arguments = parse_arguments(
        __doc__, "ylecun/mnist", seeds=seeds, steps={"type": int, "default": 2000}
    )
    silence_libraries()
    rows, source = [], f"data.dataset_name={arguments.data}"
    config = load_config("configs/gan_mnist.yaml", [source])
    train_images, held_out = (load_images(config.data, "cpu", part) for part in (False, True))
    classifier = train_classifier(train_images, config.data)
    (_, net), true = (
        classifier_features(classifier, held_out),
        to_float(held_out.take(range(len(held_out)))),
    )
    for seed in arguments.seeds:
        folder = arguments.out / f"gan_seed{seed}"
        metrics, seconds = train(
            "gan_mnist", folder, source, f"seed={seed}", f"train.max_train_steps={arguments.steps}"
        )
        rows.append(row("ours", seed, seconds, metrics))
        for width in (64, config.model.width):
            path = arguments.out / f"dcgan{width}_seed{seed}.json"
            if not path.exists():
                generated = tutorial(train_images.pixels, width, seed, seconds, len(held_out))
                write_grid([("made", to_pil(generated[:10]))], path.with_suffix(".png"), tile=64)
                metrics = distribution_metrics(generated, true, net)
                path.write_text(json.dumps(metrics | class_balance(generated, classifier)))
            rows.append(
                row(f"tutorial, width {width}", seed, seconds, json.loads(path.read_text()))
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken = [
            "objective.loss=non_saturating",
            "objective.r1=0",
            "optimizer.learning_rate=0.02",
            "train.ema_decay=null",
        ]
        broken += [
            "optimizer.betas=[0.9,0.999]",
            "train.max_grad_norm=1e6",
            "train.max_train_steps=300",
        ]
        metrics, seconds = train("gan_mnist", arguments.out / "gan_unstable", source, *broken)
    rows.append(row("unstable on purpose", 0, seconds, metrics))
    names = [
        "",
        "seed",
        "seconds",
        "FID",
        "KID",
        "precision",
        "recall",
        "digits",
        "least share",
        "most share",
    ]
    print_table(names, rows)
    print(
        "warnings of the unstable run:",
        *(str(w.message) for w in caught if w.category is FailureWarning),
        sep="\n  ",
    )


def row(name: str, seed: int, seconds: float, metrics: dict) -> list:
    keys = ("fid", "kid", "precision", "recall", "modes", "least_share", "most_share")
    return [name, seed, round(seconds), *(metrics[key] for key in keys)]


def tutorial(
    pixels: torch.Tensor, width: int, seed: int, seconds: float, count: int
) -> torch.Tensor:
    """Pictures (count, 1, 28, 28) made after so many seconds of training."""
    torch.manual_seed(seed)
    generator = nn.Sequential(
        nn.ConvTranspose2d(100, 2 * width, 7, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(True),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 1, 7, bias=False),
        nn.Flatten(0),
    )
    for module in (*generator, *discriminator):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.02)
    players = [
        torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999))
        for net in (discriminator, generator)
    ]
    loss, loader = (
        nn.BCEWithLogitsLoss(),
        DataLoader(TensorDataset(pixels), 128, shuffle=True, drop_last=True),
    )
    for (batch,) in batches_for_seconds(seconds, loader):
        real = to_float(batch)
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        players[0].zero_grad()
        loss(discriminator(real), ones).backward()
        fake = generator(torch.randn(len(real), 100, 1, 1))
        loss(discriminator(fake.detach()), zeros).backward()
        players[0].step()
        players[1].zero_grad()
        loss(discriminator(fake), ones).backward()
        players[1].step()
    generator.eval()
    with torch.no_grad():
        return torch.cat([generator(torch.randn(500, 100, 1, 1)) for _ in range(0, count, 500)])


if __name__ == "__main__":
    sys.exit(run_main(main))
