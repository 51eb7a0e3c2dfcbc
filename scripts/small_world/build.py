"""Make the small world from nothing: pictures, judge, autoencoder, and three trained bases.

python scripts/small_world/build.py            (everything, some hours on two cores)
python scripts/small_world/build.py judge vae  (some stages)

The finished world is the assets that ship with the toolkit.
"""

import io
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_world.fitting import make_autoencoder, make_judge
from small_world.untrained import TOKENS, make_untrained
from small_world.world import ASSETS, TRAINING_SEED, caption, draw, plain_thing, subject_images
from trainers.cli import make_parser, run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.families import FAMILIES
from trainers.run import run
from trainers.run_folder import PIPELINE

WORK = Path("runs/small_world")
STEPS = {"sd15": 8000, "sd3": 5000, "flux": 6000}
FLOW = [
    f"model.max_sequence_length={TOKENS}",
    "objective.debiased=false",
    "train.train_batch_size=24",
]


def make_pictures(file: Path, count: int = 26000) -> None:
    """Write the captioned drawings of plain objects that the bases are trained on."""
    import datasets

    rng, rows = np.random.default_rng(1), {"image": [], "text": []}
    for _ in range(count):
        thing, buffer = plain_thing(rng), io.BytesIO()
        draw(thing, rng).save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(caption(thing, rng))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(file)


def make_base(family: str, assets: Path) -> None:
    """Train a base with the toolkit's own trainer, and ship it in half precision.

    The judge and the subject are shipped with it.
    """
    untrained = WORK / f"untrained_{family}"
    if not untrained.exists():
        make_untrained(family, untrained, AutoencoderKL.from_pretrained(WORK / "vae"))
    overrides = [
        f"model.pretrained_model_name_or_path={untrained}",
        f"output_dir={WORK}/base_{family}",
        f"model.family={family}",
        f"train.max_train_steps={STEPS[family]}",
    ]
    if family != "sd15":
        overrides += FLOW
    settings = load_config("configs/small_world_base.yaml", overrides)
    run(settings)
    trained = settings.output_dir / PIPELINE
    pipeline = FAMILIES[family].pipeline.from_pretrained(trained, dtype=torch.float16)
    pipeline.save_pretrained(assets / family)
    shutil.copytree(WORK / "judge", assets / "judge", dirs_exist_ok=True)
    (assets / "star").mkdir(exist_ok=True)
    for i, picture in enumerate(subject_images(5, TRAINING_SEED)):
        picture.save(assets / "star" / f"{i}.png")


def main() -> None:
    stages = {
        "judge": lambda assets: make_judge(WORK / "judge"),
        "vae": lambda assets: make_autoencoder(WORK / "vae"),
        "pictures": lambda assets: make_pictures(WORK / "pictures.parquet"),
    }
    for family in STEPS:
        stages[family] = partial(make_base, family)
    parser = make_parser(__doc__)
    help = f"By default all of {', '.join(stages)}."
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=help)
    help = "The folder for the finished world."
    parser.add_argument("--assets", type=Path, default=ASSETS, help=help)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.stages if name not in stages]:
        parser.error(f"there is no stage {unknown[0]}")
    silence_libraries()
    WORK.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages or stages:
        torch.manual_seed(0)
        stages[name](arguments.assets)


if __name__ == "__main__":
    sys.exit(run_main(main))
