"""Photos that are not square, their subject at one end: aspect buckets beside center squares.

python scripts/results/portraits.py [--out FOLDER] [--seeds 0 1 2] [section.key=value ...]

Six portraits (2:3) and six landscapes (3:2) of the small world's subject, which lies in the upper
third, or in the left one. The quickstart's recipe is trained on them with buckets and with
squares out of their middle, and the gate of the small world judges both. The quickstart's base has
seen squares alone, so it first learns other shapes, of plain things only.

Prints a table, and writes the photos, their squares, and samples of both as portraits.png.
"""

import argparse
import io
import sys
from pathlib import Path

import datasets
import numpy as np
from common import print_table
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from small_world import world
from small_world.gate import LEARN, gate
from small_world.judge import load_judge
from small_world.measure import Measurement, load_pipeline, measure_samples
from trainers.cli import make_parser, run_main, silence_libraries
from trainers.config import DreamBoothConfig
from trainers.config.loading import load_config
from trainers.data.crops import Crop
from trainers.data.imaging import write_grid
from trainers.run import run
from trainers.run_folder import PIPELINE, WEIGHT_NAME

NUM_PHOTOS, PHOTO_SEED = 12, 300
LONG, SHORT, SIDE = 48, 32, 30  # of a photo, and of the square around the subject, in pixels
CENTER = 11  # of the subject, from the end that it lies at
# 40 pixels squared are about the pixels of 32 x 48
RESOLUTION = 40
# of the pictures that the base learns shapes from
BASE_SHAPES = (SHORT, SHORT), (RESOLUTION, RESOLUTION), (SHORT, LONG), (LONG, SHORT)
NUM_PLAIN, BASE_STEPS = 4000, 2000
ARMS = {"buckets": "data.buckets=true", "center squares": "data.buckets=false"}
COLUMNS = ("loss_ratio", "cosine_gain", "attributes", "star", "face", "leak", "drift")
SHOWN = 8


def draw_photos(folder: Path) -> list[Image.Image]:
    """Write the photos, three of five with a caption that names the place, as the quickstart's."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, photos = np.random.default_rng(PHOTO_SEED), []
    along = CENTER - SIDE / 2
    for i in range(NUM_PHOTOS):
        across = (SHORT - SIDE) / 2 + rng.uniform(-1, 1)
        frame = world.Frame(SHORT, LONG, across, along, SIDE)
        if i % 2:
            frame = world.Frame(LONG, SHORT, along, across, SIDE)
        background = list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)]
        photo = world.draw(world.subject(background), rng, frame=frame)
        photo.save(folder / f"{i:02d}.png")
        if i % 5 < 3:
            caption = f"{world.INSTANCE_PROMPT} {background}"
            (folder / f"{i:02d}.txt").write_text(caption + "\n")
        photos.append(photo)
    return photos


def make_base(folder: Path) -> Path:
    """The base of the quickstart after some steps on plain things in pictures of four shapes."""
    if not (folder / "run" / PIPELINE).exists():
        draw_plain_things(folder / "pictures.parquet")
        overrides = [
            "model.pretrained_model_name_or_path=scripts/small_world/assets/sd15",
            f"data.dataset_name={folder / 'pictures.parquet'}",
            f"data.resolution=[{world.SIZE}, {RESOLUTION}]",
            "train.train_text_encoder=false",
            f"train.max_train_steps={BASE_STEPS}",
            "optimizer.learning_rate=5e-4",
            "validation.prompts=[]",
            f"output_dir={folder / 'run'}",
        ]
        run(load_config("configs/small_world_base.yaml", overrides))
    return folder / "run" / PIPELINE


def draw_plain_things(file: Path) -> None:
    """Write captioned drawings: squares, portraits and landscapes, the thing anywhere in each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(PHOTO_SEED), {"image": [], "text": []}
    for i in range(NUM_PLAIN):
        width, height = BASE_SHAPES[i % len(BASE_SHAPES)]
        side = min(width, height) - 2
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        thing, buffer = world.plain_thing(rng), io.BytesIO()
        frame = world.Frame(width, height, left, top, side)
        world.draw(thing, rng, frame=frame).save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(world.caption(thing, rng))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(file)


def train_and_measure(
    config: DreamBoothConfig, base: Measurement
) -> tuple[dict[str, float], list[Image.Image]]:
    """The gate's figures of a run, which is trained if it is not there yet, and its samples."""
    if not (config.output_dir / WEIGHT_NAME).exists():
        run(config)
    measured = measure_samples(load_pipeline(config, lora=True), load_judge(), config, base)
    return measured.metrics, measured.pictures["subject"]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "The folder for the photos and the runs."
    parser.add_argument("--out", type=Path, default=Path("runs/portraits"), help=help)
    help = "Of the trainings."
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=help)
    parser.add_argument("overrides", nargs="*", help="Of configs/quickstart.yaml.")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    out = arguments.out
    photos, base_folder = draw_photos(out / "photos"), make_base(out / "base")
    sheet = [("photos", [pad(photo) for photo in photos[:SHOWN]])]
    squares = [Crop.square(LONG).cut(photo) for photo in photos[:SHOWN]]
    sheet.append(("their center squares", squares))
    base, rows = None, []
    for arm, override in ARMS.items():
        for seed in arguments.seeds:
            overrides = [
                f"model.pretrained_model_name_or_path={base_folder}",
                f"data.instance_data_dir={out / 'photos'}",
                f"data.resolution={RESOLUTION}",
                f"data.cache_dir={out / 'cache'}",
                override,
                f"seed={seed}",
                f"output_dir={out}/{arm.replace(' ', '-')}-{seed}",
                *arguments.overrides,
            ]
            config = load_config("configs/quickstart.yaml", overrides)
            if base is None:
                base = measure_samples(load_pipeline(config, lora=False), load_judge(), config)
            metrics, samples = train_and_measure(config, base)
            passed = gate(metrics)
            learnt = "yes" if all(passed[name] for name in LEARN) else "no"
            rows.append([arm, seed, *(metrics[name] for name in COLUMNS), learnt])
            if seed == arguments.seeds[0]:
                sheet.append((f"samples, {arm}", [pad(sample) for sample in samples[:SHOWN]]))
    print_table(["photos cut by", "seed", *COLUMNS, "learnt"], rows)
    write_grid(sheet, out / "portraits.png")


def pad(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a white square."""
    square = Image.new("RGB", (LONG, LONG), "white")
    square.paste(picture, ((LONG - picture.width) // 2, (LONG - picture.height) // 2))
    return square


if __name__ == "__main__":
    sys.exit(run_main(main))
