"""Images per second of the small trainers beside plain loops of the same maths, in turns.

python scripts/results/speed.py --mnist FOLDER --isbi FOLDER [--rounds 3] [--only NAME]

The plain loops have the same networks, losses and Adam, a DataLoader over `datasets` rows or files,
and ToTensor. "memory": the same over pictures decoded beforehand. A round is one seed; what is
shown are medians. See docs/results.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import plain_loops
import torch
from accelerate import Accelerator
from common import print_table
from torch import Tensor
from torch.utils.data import DataLoader

from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config import ScratchConfig
from trainers.config.loading import load_config
from trainers.from_scratch.image_sets import ImageSet
from trainers.run import TASKS
from trainers.training.loop import train

NAMES = ("autoencoder", "width 32", "GAN", "U-Net")
ARMS = ("ours", "plain", "memory")


@dataclass
class Case:
    """A config, and the plain loop of the same maths over the same pictures."""

    config: ScratchConfig
    loop: plain_loops.Loop
    rows: plain_loops.Rows | plain_loops.Pairs
    steps: int


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--mnist", default="ylecun/mnist", help="A name on the Hub, or a folder.")
    help = "The folder with the pictures and masks."
    parser.add_argument("--isbi", type=Path, default=Path("data/isbi2012"), help=help)
    parser.add_argument("--rounds", type=positive_int, default=3, help="How many seeds.")
    parser.add_argument("--only", choices=NAMES, help="One line of the table.")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    header = ["", *ARMS, "x plain", "x memory", "loss", *ARMS[1:]]
    rows = []
    for name in [arguments.only] if arguments.only else NAMES:
        case = make_case(name, arguments)
        rows.append([name, *measure(case, arguments.rounds)])
        print_table(header, rows)


def make_case(name: str, arguments: argparse.Namespace) -> Case:
    import datasets

    if name == "U-Net":
        source = [f"data.image_dir={arguments.isbi}", "data.folds=null", "train.ema_decay=null"]
        config = load_config("configs/unet_segment.yaml", source)
        return Case(config, plain_loops.segment, plain_loops.Pairs(arguments.isbi), 18)
    digits = plain_loops.Rows(datasets.load_dataset(arguments.mnist, split="train"))
    source = [f"data.dataset_name={arguments.mnist}"]
    if name == "GAN":
        source += ["objective.loss=non_saturating", "objective.r1=0", "train.ema_decay=null"]
        config = load_config("configs/gan_mnist.yaml", source)
        return Case(config, plain_loops.adversaries, digits, 60)
    if name == "width 32":
        source.append("model.width=32")
    config = load_config("configs/autoencoder_mnist.yaml", source)
    return Case(config, plain_loops.autoencoder, digits, 90)


def measure(case: Case, rounds: int) -> list:
    """Median images per second of each arm, ours over the others', and the losses."""
    config, steps = case.config, case.steps
    decoded = TASKS[config.kind](config, Accelerator(cpu=True))[0].train_images
    sources = {"plain": case.rows, "memory": case.rows.in_memory()}
    rates, losses = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
    for seed in range(rounds):
        for arm in ARMS:
            if arm == "ours":
                run = make_ours(config.model_copy(update={"seed": seed}), decoded, steps)
            else:
                torch.manual_seed(seed)
                size = config.train.train_batch_size
                loader = DataLoader(sources[arm], size, shuffle=True, drop_last=True)
                run = partial(case.loop, config, loader, steps)
            rate, loss = timed(run, config, steps)
            rates[arm].append(rate)
            losses[arm].append(loss)
    medians = {arm: float(np.median(values)) for arm, values in rates.items()}
    ratios = [medians["ours"] / medians[arm] for arm in ARMS[1:]]
    ends = [f"{np.mean(values):.4f} ± {np.std(values):.4f}" for values in losses.values()]
    return [*medians.values(), *ratios, *ends]


def make_ours(config: ScratchConfig, decoded: ImageSet, steps: int) -> Callable[[], list[Tensor]]:
    """Our training on pictures that are decoded already, which a run does once."""
    with mock.patch("trainers.from_scratch.task.load_images", return_value=decoded):
        task, batches, _ = TASKS[config.kind](config, Accelerator(cpu=True))
    settings, losses = config.train.model_copy(update={"max_train_steps": steps}), []
    name = f"{task.saved_player}_loss"

    def run() -> list[Tensor]:
        observe = [lambda step, metrics: losses.append(metrics[name])]
        train(task, batches, settings, config.seed, task.accelerator, lambda step: 1.0, observe)
        return losses

    return run


def timed(
    run: Callable[[], list[Tensor]], config: ScratchConfig, steps: int
) -> tuple[float, float]:
    """Images per second, and the mean loss of the last third."""
    start = time.perf_counter()
    losses = run()
    seconds = time.perf_counter() - start
    rate = steps * config.train.train_batch_size / seconds
    return rate, float(torch.stack(losses[-steps // 3 :]).mean())


if __name__ == "__main__":
    sys.exit(run_main(main))
