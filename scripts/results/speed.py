"""Images per second of the small trainers beside plain loops of the same maths, in turns
(docs/results.md).

python scripts/results/speed.py --mnist FOLDER --isbi FOLDER [--rounds 3] [--only NAME]

The plain loops have the same networks, losses and Adam, a DataLoader over `datasets` rows or files,
and ToTensor. "memory": the same over pictures decoded beforehand. A round is one seed; what is
shown are medians.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import cycle_loader, print_table
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

from trainers.cli import make_parser, run_main, silence_libraries
from trainers.config import ScratchConfig
from trainers.config.loading import load_config
from trainers.from_scratch.image_sets import ImageSet
from trainers.run import TASKS
from trainers.training.loop import train

Loop = Callable[[ScratchConfig, DataLoader, int], list[torch.Tensor]]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--mnist", default="ylecun/mnist", help="Hub name, or a folder")
    parser.add_argument("--isbi", type=Path, default=Path("data/isbi2012"), help="folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="one line of the table, by its name")
    arguments = parser.parse_args()
    silence_libraries()
    import datasets

    digits, half = (
        datasets.load_dataset(arguments.mnist, split="train"),
        ("data.dataset_name=" + arguments.mnist,),
    )
    gan = ("objective.loss=non_saturating", "objective.r1=0", "train.ema_decay=null")
    unet = (f"data.image_dir={arguments.isbi}", "data.folds=null", "train.ema_decay=null")
    cases = [
        (
            "autoencoder",
            load_config("configs/autoencoder_mnist.yaml", half),
            autoencoder,
            Rows(digits),
            90,
        ),
        (
            "width 32",
            load_config("configs/autoencoder_mnist.yaml", [*half, "model.width=32"]),
            autoencoder,
            Rows(digits),
            90,
        ),
        (
            "GAN",
            load_config("configs/gan_mnist.yaml", [*half, *gan]),
            adversaries,
            Rows(digits),
            60,
        ),
        (
            "U-Net",
            load_config("configs/unet_segment.yaml", unet),
            segment,
            Pairs(arguments.isbi),
            18,
        ),
    ]
    table = []
    for name, config, loop, rows, steps in (
        case for case in cases if arguments.only in (case[0], None)
    ):
        results: dict[str, list] = {"ours": [], "plain": [], "memory": []}
        in_memory, decoded = (
            InMemory(rows),
            TASKS[config.kind](config, Accelerator(cpu=True))[0].train_images,
        )
        for seed in range(arguments.rounds):
            results["ours"].append(ours(config.model_copy(update={"seed": seed}), decoded, steps))
            for arm, source in (("plain", rows), ("memory", in_memory)):
                torch.manual_seed(seed)
                loader = DataLoader(
                    source, config.train.train_batch_size, shuffle=True, drop_last=True
                )
                results[arm].append(timed(partial(loop, config, loader, steps), config, steps))
        rate, loss = ({arm: np.array(r)[:, k] for arm, r in results.items()} for k in (0, 1))
        middle = {arm: float(np.median(values)) for arm, values in rate.items()}
        ends = [f"{np.mean(values):.4f} ± {np.std(values):.4f}" for values in loss.values()]
        ratios = [middle["ours"] / middle[arm] for arm in ("plain", "memory")]
        table.append([name, *middle.values(), *ratios, *ends])
        print_table(
            ["", "ours", "plain", "memory", "x plain", "x memory", "loss", "plain", "memory"], table
        )


def ours(config: ScratchConfig, decoded: ImageSet, steps: int) -> tuple[float, float]:
    """Decoding is once per run, and not counted."""
    with mock.patch("trainers.from_scratch.task.load_images", return_value=decoded):
        task, batches, _ = TASKS[config.kind](config, Accelerator(cpu=True))
    settings, losses = config.train.model_copy(update={"max_train_steps": steps}), []
    name = f"{task.saved_player}_loss"

    def run() -> list[torch.Tensor]:
        observe = [lambda step, metrics: losses.append(metrics[name])]
        train(task, batches, settings, config.seed, task.accelerator, lambda step: 1.0, observe)
        return losses

    return timed(run, config, steps)


def timed(
    run: Callable[[], list[torch.Tensor]], config: ScratchConfig, steps: int
) -> tuple[float, float]:
    """Images per second, and the mean loss of the last third."""
    start = time.perf_counter()
    losses = run()
    seconds = time.perf_counter() - start
    return steps * config.train.train_batch_size / seconds, float(
        torch.stack(losses[-steps // 3 :]).mean()
    )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """What torchvision's ToTensor and Normalize(0.5, 0.5) do."""
    array = np.array(image)
    x = (
        torch.from_numpy(array)
        .view(*array.shape[:2], -1)
        .permute(2, 0, 1)
        .contiguous()
        .float()
        .div(255)
    )
    return x.sub_(0.5).div_(0.5)


class Rows(Dataset):
    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return to_tensor(self.rows[i]["image"])


class Pairs(Dataset):
    """Both files opened each time; the same changes as ours, one pair at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*_image.png"))

    def __len__(self) -> int:
        return 10000  # so that an epoch outlasts the measurement

    def __getitem__(self, i: int) -> torch.Tensor:
        path = self.files[i % len(self.files)]
        mask = path.with_name(path.name.replace("_image", "_mask"))
        return augment_pair(torch.cat([to_tensor(Image.open(path)), to_tensor(Image.open(mask))]))


def augment_pair(pair: torch.Tensor, side: int = 256, sigma: float = 8) -> torch.Tensor:
    """A crop, flipped, turned and bent by a 3 x 3 grid, as tutorials do it with SciPy."""
    top, left = (int(torch.randint(length - side + 1, ())) for length in pair.shape[1:])
    pair = pair[:, top : top + side, left : left + side]
    for axis in (1, 2):
        pair = pair.flip(axis) if torch.rand(()) < 0.5 else pair
    pair = pair.rot90(int(torch.randint(4, ())), (1, 2))
    at = [ndimage.zoom(sigma * torch.randn(3, 3).numpy(), side / 3, order=3) for _ in range(2)]
    at = np.meshgrid(np.arange(side), np.arange(side), indexing="ij") + np.stack(at)
    bent = [
        ndimage.map_coordinates(p.numpy(), at, order=1 - i, mode="reflect")
        for i, p in enumerate(pair)
    ]
    return torch.from_numpy(np.stack(bent))


class InMemory(Dataset):
    """The same, decoded beforehand; digits become pictures again, as torchvision's MNIST does."""

    def __init__(self, rows: Dataset, maximum: int = 6000) -> None:
        self.pairs = isinstance(rows, Pairs)
        if self.pairs:
            self.items = [
                torch.cat(
                    [
                        to_tensor(Image.open(p)),
                        to_tensor(Image.open(str(p).replace("_image", "_mask"))),
                    ]
                )
                for p in rows.files
            ]
        else:
            self.items = [np.array(rows.rows[i]["image"]) for i in range(min(maximum, len(rows)))]

    def __len__(self) -> int:
        return 10000 if self.pairs else len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        item = self.items[i % len(self.items)]
        return augment_pair(item) if self.pairs else to_tensor(Image.fromarray(item))


def clip(model: torch.nn.Module, config: ScratchConfig) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)


def autoencoder(config: ScratchConfig, loader: DataLoader, steps: int) -> list[torch.Tensor]:
    from trainers.from_scratch.networks import ConvAutoencoder

    model, losses = ConvAutoencoder(1, 28, **dict(config.model)), []
    optimizer = torch.optim.AdamW(
        model.parameters(), config.optimizer.learning_rate, weight_decay=0
    )
    for x in islice(cycle_loader(loader), steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x)[0], x)
        loss.backward()
        clip(model, config)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def adversaries(config: ScratchConfig, loader: DataLoader, steps: int) -> list[torch.Tensor]:
    from trainers.from_scratch.networks import Discriminator, Generator

    latent, width, losses = config.model.latent_dim, config.model.width, []
    generator = Generator("dcgan", 1, 28, width, latent, 0)
    discriminator = Discriminator("dcgan", 1, 28, width, 0, False)
    rate, betas = config.optimizer.learning_rate, config.optimizer.betas
    players = [
        torch.optim.AdamW(n.parameters(), rate, betas, weight_decay=0)
        for n in (discriminator, generator)
    ]
    for x in islice(cycle_loader(loader), steps):
        ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
        players[0].zero_grad()
        F.binary_cross_entropy_with_logits(discriminator(x), ones).backward()
        generated = generator(torch.randn(len(x), latent))
        F.binary_cross_entropy_with_logits(discriminator(generated.detach()), zeros).backward()
        clip(discriminator, config)
        players[0].step()
        players[1].zero_grad()
        loss = F.binary_cross_entropy_with_logits(discriminator(generated), ones)
        loss.backward()
        clip(generator, config)
        players[1].step()
        losses.append(loss.detach())
    return losses


def segment(config: ScratchConfig, loader: DataLoader, steps: int) -> list[torch.Tensor]:
    from trainers.from_scratch.networks import UNet
    from trainers.from_scratch.uses import USES

    model, use, losses = UNet(1, 2, **dict(config.model)), USES["segment"](config), []
    optimizer = torch.optim.AdamW(model.parameters(), config.optimizer.learning_rate)
    for pair in islice(cycle_loader(loader), steps):
        optimizer.zero_grad()
        loss = use.loss(model(pair[:, :1]), (pair[:, 1] > 0).long())
        loss.backward()
        clip(model, config)
        optimizer.step()
        losses.append(loss.detach())
    return losses


if __name__ == "__main__":
    sys.exit(run_main(main))
