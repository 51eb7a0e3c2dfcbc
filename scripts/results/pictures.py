"""Colours for grey CIFAR-10 pictures, and EM pictures from membranes by pix2pix (docs/results.md).

python scripts/results/pictures.py colorize [--data FOLDER] [--out runs/results]
python scripts/results/pictures.py pix2pix --data ISBI_FOLDER
"""

import sys

import torch
from common import arguments, print_table, train

from trainers.cli import exit_status, silence
from trainers.config.loading import load
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.uses.colorize import AB, Colorize, lab
from trainers.metrics.image_quality import colourfulness, psnr


def main() -> None:
    silence()
    {"colorize": colorize, "pix2pix": pix2pix}[sys.argv.pop(1)]()


def colorize() -> None:
    column = {"default": "img", "help": "column of the pictures"}
    chosen = arguments(__doc__, "uoft-cs/cifar10", column=column, steps={"type": int, "default": 800})
    source = [f"data.dataset_name={chosen.data}", f"data.image_column={chosen.column}"]
    source, rows = [*source, f"train.max_train_steps={chosen.steps}"], []
    config = load("configs/unet_colorize.yaml", source)
    use = Colorize(config)
    learnt, held_out = (load_images(config.data, "cpu", part) for part in (False, True))
    mean = torch.stack([lab(learnt.take([i]))[0, 1:].mean((1, 2)) for i in range(0, len(learnt), 10)]).mean(0) / AB
    x, y = use.pair(held_out.take(range(len(held_out))), None)
    true = use.render(x, y)
    for name, ab in (("grey", torch.zeros(2)), ("mean a and b", mean)):
        made = torch.cat([use.render(part, ab[:, None, None].expand(len(part), 2, 32, 32)) for part in x.split(1000)])
        rows.append([name, "", psnr(made, true), colourfulness(made)])
    for name, *more in (("regression",), ("rebalanced", "objective.rebalanced=true")):
        figures, seconds = train("unet_colorize", chosen.out / f"colorize_{name}", *source, *more)
        rows.append([f"ours, {name}", round(seconds), figures["psnr"], figures["colourfulness"]])
    rows.append(["true", "", "", colourfulness(true)])
    print_table(["", "seconds", "PSNR, dB", "colourfulness"], rows)


def pix2pix() -> None:
    chosen, rows = arguments(__doc__, "data/isbi2012", steps={"type": int, "default": 300}), []
    source = ["data.dataset_name=null", "data.target_column=null", f"data.image_dir={chosen.data}", "data.channels=1"]
    source += ["data.image_suffix=_mask", "data.target_suffix=_image", "data.folds=5", "data.crop=true"]
    source += [
        "model.width=16",
        "objective.l1_weight=10",
        "data.resolution=128",
        "data.random_flip=true",
        f"train.max_train_steps={chosen.steps}",
    ]
    for name, *more in (("adversary + L1",), ("L1 alone", "objective.adversarial=false")):
        folder = chosen.out / f"pix2pix_{name.split()[0]}"
        figures, seconds = train("unet_pix2pix", folder, *source, *more)
        rows.append([name, round(seconds), figures["sharpness"], figures["psnr"], figures["ssim"]])
    print_table(["", "seconds", "sharpness (true = 1)", "PSNR, dB", "SSIM"], rows)


if __name__ == "__main__":
    sys.exit(exit_status(main))
