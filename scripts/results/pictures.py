"""Colours for grey CIFAR-10 pictures, and EM pictures from membranes by pix2pix (docs/results.md).

python scripts/results/pictures.py colorize [--data FOLDER] [--out runs/results]
python scripts/results/pictures.py pix2pix --data ISBI_FOLDER
"""

import sys

import torch
from common import parse_arguments, print_table, train

from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.uses.colorize import AB_SCALE, Colorize, rgb_pixels_to_lab
from trainers.metrics.image_quality import colorfulness, psnr


def main() -> None:
    silence_libraries()
    {"colorize": colorize, "pix2pix": pix2pix}[sys.argv.pop(1)]()


def colorize() -> None:
    column = {"default": "img", "help": "column of the pictures"}
    arguments = parse_arguments(
        __doc__, "uoft-cs/cifar10", column=column, steps={"type": int, "default": 800}
    )
    source = [f"data.dataset_name={arguments.data}", f"data.image_column={arguments.column}"]
    source, rows = [*source, f"train.max_train_steps={arguments.steps}"], []
    config = load_config("configs/unet_colorize.yaml", source)
    use = Colorize(config)
    train_images, held_out = (load_images(config.data, "cpu", part) for part in (False, True))
    mean = (
        torch.stack(
            [
                rgb_pixels_to_lab(train_images.take([i]))[0, 1:].mean((1, 2))
                for i in range(0, len(train_images), 10)
            ]
        ).mean(0)
        / AB_SCALE
    )
    x, y = use.pair(held_out.take(range(len(held_out))), None)
    true = use.to_image(x, y)
    for name, ab in (("grey", torch.zeros(2)), ("mean a and b", mean)):
        generated = torch.cat(
            [
                use.to_image(part, ab[:, None, None].expand(len(part), 2, 32, 32))
                for part in x.split(1000)
            ]
        )
        rows.append([name, "", psnr(generated, true), colorfulness(generated)])
    for name, *more in (("regression",), ("rebalanced", "objective.rebalanced=true")):
        metrics, seconds = train(
            "unet_colorize", arguments.out / f"colorize_{name}", *source, *more
        )
        rows.append([f"ours, {name}", round(seconds), metrics["psnr"], metrics["colourfulness"]])
    rows.append(["true", "", "", colorfulness(true)])
    print_table(["", "seconds", "PSNR, dB", "colourfulness"], rows)


def pix2pix() -> None:
    arguments, rows = (
        parse_arguments(__doc__, "data/isbi2012", steps={"type": int, "default": 300}),
        [],
    )
    source = [
        "data.dataset_name=null",
        "data.target_column=null",
        f"data.image_dir={arguments.data}",
        "data.channels=1",
    ]
    source += [
        "data.image_suffix=_mask",
        "data.target_suffix=_image",
        "data.folds=5",
        "data.crop=true",
    ]
    source += [
        "model.width=16",
        "objective.l1_weight=10",
        "data.resolution=128",
        "data.random_flip=true",
        f"train.max_train_steps={arguments.steps}",
    ]
    for name, *more in (("adversary + L1",), ("L1 alone", "objective.adversarial=false")):
        folder = arguments.out / f"pix2pix_{name.split()[0]}"
        metrics, seconds = train("unet_pix2pix", folder, *source, *more)
        rows.append([name, round(seconds), metrics["sharpness"], metrics["psnr"], metrics["ssim"]])
    print_table(["", "seconds", "sharpness (true = 1)", "PSNR, dB", "SSIM"], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
