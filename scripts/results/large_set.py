"""How long a DreamBooth run of many photos takes to its first step, at first and once more.

python scripts/results/large_set.py [--count 5000] [--out runs/large_set] [KEY=VALUE ...]

The photos (384 x 384, JPEG) are drawn from noise, once; the base is the one of
configs/quickstart.yaml, with pictures of 64 pixels. Both runs end after one step and have the same
cache, the second one another run folder. Times are seconds without the imports. See
docs/performance.md.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from common import print_table
from memory import resident
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainers import dreambooth, encoded_pictures
from trainers.atomic import replacing_file
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.data import photo_checks
from trainers.run import run

SIDE, GRAIN = 384, 24  # pixels; a grain is a spot of one color
# the parts of a start, by the functions that do them
PARTS = {
    "photos read and checked": (photo_checks, "load_photos"),
    "captions counted": (photo_checks, "report"),
    "encoded, or found in the cache": (encoded_pictures, "fill_cache"),
    "facts for resuming": (dreambooth, "describe_pools"),
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=positive_int, default=5000, help="How many photos.")
    help = "The folder for photos, cache and runs."
    parser.add_argument("--out", type=Path, default=Path("runs/large_set"), help=help)
    parser.add_argument("--child", type=Path, help="A run folder, to run in this process.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Of the config.")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    photos = arguments.out / f"photos-{arguments.count}"
    if arguments.child:
        print(json.dumps(measure_run(arguments.child, photos, arguments)))
        return
    draw_photos(photos, arguments.count)
    for name in ("cache", "first", "second"):
        shutil.rmtree(arguments.out / name, ignore_errors=True)
    columns = {}
    for name in ("first", "second"):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(arguments.out / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        columns[name] = json.loads(result.stdout.splitlines()[-1])
    rows = [[part, *(figures[part] for figures in columns.values())] for part in columns["first"]]
    print_table(["", *columns], rows)


def measure_run(folder: Path, photos: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part until the first step, peak memory, and the size of the cache."""
    cache = arguments.out / "cache"
    settings = load_config(
        "configs/quickstart.yaml",
        [
            f"output_dir={folder}",
            f"data.instance_data_dir={photos}",
            f"data.cache_dir={cache}",
            "data.resolution=64",
            "data.prior=none",
            "train.max_train_steps=1",
            "optimizer.lr_warmup_steps=0",
            "validation.prompts=[]",
            "tracking.report_to=[]",
            *arguments.overrides,
        ],
    )
    times = dict.fromkeys(PARTS, 0.0)
    before, start, ends = resident("VmRSS"), clocks(), []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(clocks()))
    patches = []
    for part, (module, name) in PARTS.items():
        timed = partial(run_timed, getattr(module, name), times, part)
        patches.append(mock.patch.object(module, name, timed))
    for patch in patches:
        patch.start()
    run(settings)
    hook.remove()
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {
        **times,
        "**to the end of step 1**": ends[0][0] - start[0],
        "CPU seconds to there": ends[0][1] - start[1],
        "memory of the process before, MiB": before,
        "peak memory, MiB": resident("VmHWM"),
        "files of the cache": len(files),
        "their bytes, MiB": sum(path.stat().st_size for path in files) / 2**20,
        "on the disk, MiB": sum(path.stat().st_blocks for path in files) / 2**11,
    }


def clocks() -> tuple[float, float]:
    """The seconds that have passed, and those that all threads have computed for."""
    return time.perf_counter(), time.process_time()


def run_timed(function: Callable, times: dict[str, float], part: str, *arguments: object) -> object:
    start = time.perf_counter()
    try:
        return function(*arguments)
    finally:
        times[part] += time.perf_counter() - start


def draw_photos(folder: Path, count: int) -> None:
    """Write those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(partial(draw_photo, folder), range(count), chunksize=50))


def draw_photo(folder: Path, number: int) -> None:
    path = folder / f"{number:06d}.jpg"
    if path.exists():
        return
    rng = np.random.default_rng(number)
    grains = rng.integers(0, 256, (SIDE // GRAIN, SIDE // GRAIN, 3), dtype=np.uint8)
    image = Image.fromarray(grains).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (SIDE, SIDE, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
    with replacing_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(run_main(main))
