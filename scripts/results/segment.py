"""ISBI 2012: membranes by our U-Net and by a plain tutorial recipe, the same seconds each, 5 folds (docs/results.md).

python scripts/results/segment.py --data FOLDER [--out runs/results] [--folds 0 1 2 3 4] [--steps 150]
    [--rate 1e-4] [--patience 1]

The plain recipe: U-Net with batch norm and ReLU, as wide as ours at the first level, transposed convolutions, Adam at
1e-4, cross-entropy, batches of 4 crops of 256 pixels, flips, the whole picture at the end.
"""

import json
import sys

import torch
import torch.nn.functional as F
from common import arguments, during, print_table, train
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainers.cli import exit_status, silence
from trainers.config.loading import load
from trainers.data.imaging import pictures, write_grid
from trainers.from_scratch.image_sets import Images, load_images
from trainers.from_scratch.networks import UNet
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.segment import IGNORED
from trainers.metrics.image_quality import confusion


def main() -> None:
    folds = {"type": int, "nargs": "+", "default": list(range(5))}
    rate = {"type": float, "default": 1e-4, "help": "of the plain recipe"}
    patience = {"type": float, "default": 1, "help": "times our seconds that the plain recipe has"}
    steps = {"type": int, "default": 150}
    chosen = arguments(__doc__, "data/isbi2012", folds=folds, rate=rate, patience=patience, steps=steps)
    silence()
    rows = []
    for fold in chosen.folds:
        source = [f"data.image_dir={chosen.data}", f"data.fold={fold}", f"train.max_train_steps={chosen.steps}"]
        figures, seconds = train("unet_segment", chosen.out / f"segment_fold{fold}", *source)
        config = load("configs/unet_segment.yaml", source)
        path = chosen.out / f"segment_tutorial{chosen.rate:g}_x{chosen.patience:g}_fold{fold}.json"
        if not path.exists():
            reader = USES["segment"](config).target
            learnt, held_out = (load_images(config.data, "cpu", part, reader) for part in (False, True))
            time = chosen.patience * seconds
            path.write_text(json.dumps(tutorial(learnt, held_out, config.model.width, chosen.rate, time, path)))
        plain = json.loads(path.read_text())
        keys = ("dice_0", "iou_0", "pixel_error")
        rows.append([fold, round(seconds), *(figures[key] for key in keys), *(plain[key] for key in keys)])
    means = torch.tensor([row[2:] for row in rows])
    rows += [["mean", "", *means.mean(0).tolist()], ["std", "", *means.std(0).tolist()]]
    names = ["Dice", "IoU", "pixel error"]
    print_table(["fold", "seconds", *names, *(f"plain {name}" for name in names)], rows)


class Crops(Dataset):
    """What a tutorial's data set does: one crop, one coin for each flip, one pair at a time."""

    def __init__(self, images: Images, side: int) -> None:
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
        self.down = nn.ModuleList(self.double(a, b) for a, b in zip([1, *widths], widths, strict=False))
        back = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in back)
        self.up = nn.ModuleList(self.double(a, b) for a, b in back)

    @staticmethod
    def double(a: int, b: int) -> nn.Sequential:
        layers = []
        for i, o in ((a, b), (b, b)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)


def tutorial(learnt: Images, held_out: Images, width: int, rate: float, seconds: float, path) -> dict[str, float]:
    torch.manual_seed(0)
    model = PlainUNet(width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    loader = DataLoader(Crops(learnt, 256), 4, shuffle=True, drop_last=True)
    for x, y in during(seconds, loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        test = held_out.take(range(len(held_out)))
        made = torch.cat([model(part / 255) for part in test[:, :1].split(1)]).argmax(1)
    shown = [("plain", pictures(2 * made[:3, None].float() - 1)), ("true", pictures(2 * test[:3, 1:].float() - 1))]
    write_grid(shown, path.with_suffix(".png"))
    return confusion(made, test[:, 1].long(), 2, IGNORED)


if __name__ == "__main__":
    sys.exit(exit_status(main))
