"""ISBI 2012: membranes by our U-Net and by a plain tutorial recipe, the same seconds each, 5 folds
(docs/results.md).

python scripts/results/segment.py --data FOLDER [--out runs/results] [--folds 0 1 2 3 4] [--steps
150]
    [--rate 1e-4] [--patience 1]

The plain recipe: U-Net with batch norm and ReLU, as wide as ours at the first level, transposed
convolutions, Adam at 1e-4, cross-entropy, batches of 4 crops of 256 pixels, flips, the whole
picture at the end.
"""

import json
import sys

import torch
import torch.nn.functional as F
from common import batches_for_seconds, parse_arguments, print_table, train
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainers.cli import run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.data.imaging import to_pil, write_grid
from trainers.from_scratch.image_sets import ImageSet, load_images
from trainers.from_scratch.networks import UNet
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.segment import IGNORE_INDEX
from trainers.metrics.image_quality import confusion_metrics


def main() -> None:
    folds = {"type": int, "nargs": "+", "default": list(range(5))}
    rate = {"type": float, "default": 1e-4, "help": "of the plain recipe"}
    patience = {"type": float, "default": 1, "help": "times our seconds that the plain recipe has"}
    steps = {"type": int, "default": 150}
    arguments = parse_arguments(
        __doc__, "data/isbi2012", folds=folds, rate=rate, patience=patience, steps=steps
    )
    silence_libraries()
    rows = []
    for fold in arguments.folds:
        source = [
            f"data.image_dir={arguments.data}",
            f"data.fold={fold}",
            f"train.max_train_steps={arguments.steps}",
        ]
        metrics, seconds = train("unet_segment", arguments.out / f"segment_fold{fold}", *source)
        config = load_config("configs/unet_segment.yaml", source)
        path = (
            arguments.out
            / f"segment_tutorial{arguments.rate:g}_x{arguments.patience:g}_fold{fold}.json"
        )
        if not path.exists():
            reader = USES["segment"](config).read_target
            train_images, held_out = (
                load_images(config.data, "cpu", part, reader) for part in (False, True)
            )
            time = arguments.patience * seconds
            path.write_text(
                json.dumps(
                    tutorial(train_images, held_out, config.model.width, arguments.rate, time, path)
                )
            )
        plain = json.loads(path.read_text())
        keys = ("dice_0", "iou_0", "pixel_error")
        rows.append(
            [fold, round(seconds), *(metrics[key] for key in keys), *(plain[key] for key in keys)]
        )
    averages = torch.tensor([row[2:] for row in rows])
    rows += [["mean", "", *averages.mean(0).tolist()], ["std", "", *averages.std(0).tolist()]]
    names = ["Dice", "IoU", "pixel error"]
    print_table(["fold", "seconds", *names, *(f"plain {name}" for name in names)], rows)


class Crops(Dataset):
    """What a tutorial's data set does: one crop, one coin for each flip, one pair at a time."""

    def __init__(self, images: ImageSet, side: int) -> None:
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
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
        self.down = nn.ModuleList(
            self.double(a, b) for a, b in zip([1, *widths], widths, strict=False)
        )
        back = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in back)
        self.up = nn.ModuleList(self.double(a, b) for a, b in back)

    @staticmethod
    def double(a: int, b: int) -> nn.Sequential:
        layers = []
        for i, o in ((a, b), (b, b)):
            layers += [
                nn.Conv2d(i, o, 3, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)


def tutorial(
    train_images: ImageSet, held_out: ImageSet, width: int, rate: float, seconds: float, path
) -> dict[str, float]:
    torch.manual_seed(0)
    model = PlainUNet(width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    loader = DataLoader(Crops(train_images, 256), 4, shuffle=True, drop_last=True)
    for x, y in batches_for_seconds(seconds, loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        test = held_out.take(range(len(held_out)))
        generated = torch.cat([model(part / 255) for part in test[:, :1].split(1)]).argmax(1)
    rows = [
        ("plain", to_pil(2 * generated[:3, None].float() - 1)),
        ("true", to_pil(2 * test[:3, 1:].float() - 1)),
    ]
    write_grid(rows, path.with_suffix(".png"))
    return confusion_metrics(generated, test[:, 1].long(), 2, IGNORE_INDEX)


if __name__ == "__main__":
    sys.exit(run_main(main))
