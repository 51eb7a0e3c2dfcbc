"""ISBI 2012: membranes by our U-Net and by a plain tutorial recipe, the same seconds each.

python scripts/results/segment.py --data FOLDER [--out runs/results] [--folds 0 1 2 3 4]
    [--steps 150] [--rate 1e-4] [--patience 1]

The plain recipe: U-Net with batch norm and ReLU, as wide as ours at the first level, transposed
convolutions, Adam at 1e-4, cross-entropy, batches of 4 crops of 256 pixels, flips, the whole
picture at the end. See docs/results.md.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    Metrics,
    batches_for_seconds,
    print_table,
    read_or_compute,
    results_parser,
    train,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.config.unet import UNetConfig
from trainers.data.imaging import to_pil, write_grid
from trainers.from_scratch.image_sets import ImageSet, load_images
from trainers.from_scratch.networks import UNet
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.segment import IGNORE_INDEX
from trainers.metrics.image_quality import confusion_metrics

COLUMNS = {"Dice": "dice_0", "IoU": "iou_0", "pixel error": "pixel_error"}


def parse_arguments() -> argparse.Namespace:
    parser = results_parser(__doc__, "data/isbi2012")
    help = "Which fifths of the pictures are held out, each from runs of its own."
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)), help=help)
    parser.add_argument("--steps", type=int, default=150, help="Steps of our runs.")
    help = "The learning rate of the plain recipe."
    parser.add_argument("--rate", type=float, default=1e-4, help=help)
    help = "How many times our seconds the plain recipe has."
    parser.add_argument("--patience", type=float, default=1, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    rows = [fold_row(arguments, fold) for fold in arguments.folds]
    averages = torch.tensor([row[2:] for row in rows])
    rows.append(["mean", "", *averages.mean(0).tolist()])
    rows.append(["std", "", *averages.std(0).tolist()])
    plain = [f"plain {name}" for name in COLUMNS]
    print_table(["fold", "seconds", *COLUMNS, *plain], rows)


def fold_row(arguments: argparse.Namespace, fold: int) -> list:
    """Our metrics and those of the plain recipe with one fold held out."""
    source = [
        f"data.image_dir={arguments.data}",
        f"data.fold={fold}",
        f"train.max_train_steps={arguments.steps}",
    ]
    ours, seconds = train("unet_segment", arguments.out / f"segment_fold{fold}", *source)
    config = load_config("configs/unet_segment.yaml", source)
    name = f"segment_tutorial{arguments.rate:g}_x{arguments.patience:g}_fold{fold}"
    path = arguments.out / f"{name}.json"
    allowed = arguments.patience * seconds
    measure = partial(train_plain, config, arguments.rate, allowed, path.with_suffix(".png"))
    plain = read_or_compute(path, measure)
    cells = [metrics[key] for metrics in (ours, plain) for key in COLUMNS.values()]
    return [fold, round(seconds), *cells]


class Crops(Dataset):
    """What a tutorial's data set does: one crop, one coin for each flip, one pair at a time."""

    def __init__(self, images: ImageSet, side: int) -> None:
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        pixels, side = self.images[i], self.side
        top, left = (int(torch.randint(length - side + 1, ())) for length in pixels.shape[1:])
        pixels = pixels[:, top : top + side, left : left + side]
        for axis in (1, 2):
            pixels = pixels.flip(axis) if torch.rand(()) < 0.5 else pixels
        return pixels[:1] / 255, pixels[1].long()


class PlainUNet(UNet):
    """The same way down and up through other blocks."""

    def __init__(self, width: int, levels: int = 5) -> None:
        super().__init__(1, 2, width, levels)
        widths = [width * 2**i for i in range(levels)]
        down = zip([1, *widths], widths, strict=False)
        up = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.down = nn.ModuleList(double_block(a, b) for a, b in down)
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in up)
        self.up = nn.ModuleList(double_block(a, b) for a, b in up)


def double_block(a: int, b: int) -> nn.Sequential:
    """Two convolutions, from a channels to b."""
    layers = []
    for channels in (a, b):
        layers.append(nn.Conv2d(channels, b, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def train_plain(config: UNetConfig, rate: float, seconds: float, grid: Path) -> Metrics:
    """The metrics after so many seconds of training; some pictures are written to `grid`."""
    reader = USES["segment"](config).read_target
    images, held_out = (load_images(config.data, "cpu", part, reader) for part in (False, True))
    torch.manual_seed(0)
    model = PlainUNet(config.model.width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    loader = DataLoader(Crops(images, 256), 4, shuffle=True, drop_last=True)
    for x, y in batches_for_seconds(seconds, loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    test = held_out.take(range(len(held_out)))
    with torch.no_grad():
        logits = torch.cat([model(picture / 255) for picture in test[:, :1].split(1)])
    generated = logits.argmax(1)
    found = to_pil(2 * generated[:3, None].float() - 1)
    true = to_pil(2 * test[:3, 1:].float() - 1)
    write_grid([("plain", found), ("true", true)], grid)
    return confusion_metrics(generated, test[:, 1].long(), 2, IGNORE_INDEX)


if __name__ == "__main__":
    sys.exit(run_main(main))
