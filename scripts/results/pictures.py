"""Colors for grey CIFAR-10 pictures, or EM pictures from membranes by pix2pix.

python scripts/results/pictures.py colorize [--data FOLDER] [--out runs/results]
python scripts/results/pictures.py pix2pix --data ISBI_FOLDER

See docs/results.md.
"""

import argparse
import sys

import torch
from common import print_table, results_parser, train
from torch import Tensor

from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.from_scratch.image_sets import ImageSet, load_images
from trainers.from_scratch.uses.colorize import AB_SCALE, Colorize, rgb_pixels_to_lab
from trainers.metrics.image_quality import colorfulness, psnr

# use: its data set unless another is given, and the steps of its runs
DEFAULTS = {"colorize": ("uoft-cs/cifar10", 800), "pix2pix": ("data/isbi2012", 300)}
MEMBRANES = [
    "data.dataset_name=null",
    "data.target_column=null",
    "data.channels=1",
    "data.image_suffix=_mask",
    "data.target_suffix=_image",
    "data.folds=5",
    "data.crop=true",
    "data.resolution=128",
    "data.random_flip=true",
    "model.width=16",
    "objective.l1_weight=10",
]


def parse_arguments() -> argparse.Namespace:
    parser = results_parser(__doc__, "")
    parser.add_argument("use", choices=DEFAULTS)
    help = "Of colorize: the column with the pictures."
    parser.add_argument("--column", default="img", help=help)
    defaults = ", ".join(f"{steps} of {use}" for use, (_, steps) in DEFAULTS.items())
    parser.add_argument("--steps", type=int, help=f"Steps of our runs. By default {defaults}.")
    arguments = parser.parse_args()
    data, steps = DEFAULTS[arguments.use]
    arguments.data = arguments.data or data
    arguments.steps = arguments.steps or steps
    return arguments


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    {"colorize": colorize, "pix2pix": pix2pix}[arguments.use](arguments)


def colorize(arguments: argparse.Namespace) -> None:
    source = [
        f"data.dataset_name={arguments.data}",
        f"data.image_column={arguments.column}",
        f"train.max_train_steps={arguments.steps}",
    ]
    config = load_config("configs/unet_colorize.yaml", source)
    use = Colorize(config)
    train_images, held_out = (load_images(config.data, "cpu", part) for part in (False, True))
    x, y = use.pair(held_out.take(range(len(held_out))), None)
    true = use.to_image(x, y)
    rows = []
    for name, ab in (("grey", torch.zeros(2)), ("mean a and b", mean_ab(train_images))):
        generated = paint(use, x, ab)
        rows.append([name, "", psnr(generated, true), colorfulness(generated)])
    for name, *more in (("regression",), ("rebalanced", "objective.rebalanced=true")):
        folder = arguments.out / f"colorize_{name}"
        metrics, seconds = train("unet_colorize", folder, *source, *more)
        rows.append([f"ours, {name}", round(seconds), metrics["psnr"], metrics["colourfulness"]])
    rows.append(["true", "", "", colorfulness(true)])
    print_table(["", "seconds", "PSNR, dB", "colourfulness"], rows)


def mean_ab(images: ImageSet) -> Tensor:
    """The mean a and b (2,) of every tenth picture, in the units of the network."""
    means = []
    for i in range(0, len(images), 10):
        lab = rgb_pixels_to_lab(images.take([i]))[0]
        means.append(lab[1:].mean((1, 2)))
    return torch.stack(means).mean(0) / AB_SCALE


def paint(use: Colorize, x: Tensor, ab: Tensor) -> Tensor:
    """Pictures of lightness x (N, 1, 32, 32) that have one color ab (2,) all over."""
    parts = []
    for part in x.split(1000):
        parts.append(use.to_image(part, ab[:, None, None].expand(len(part), 2, 32, 32)))
    return torch.cat(parts)


def pix2pix(arguments: argparse.Namespace) -> None:
    source = [f"data.image_dir={arguments.data}", f"train.max_train_steps={arguments.steps}"]
    rows = []
    for name, *more in (("adversary + L1",), ("L1 alone", "objective.adversarial=false")):
        folder = arguments.out / f"pix2pix_{name.split()[0]}"
        metrics, seconds = train("unet_pix2pix", folder, *MEMBRANES, *source, *more)
        rows.append([name, round(seconds), metrics["sharpness"], metrics["psnr"], metrics["ssim"]])
    print_table(["", "seconds", "sharpness (true = 1)", "PSNR, dB", "SSIM"], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
