"""Two subjects of the small world in one run: is each learnt, and who bleeds into whom?

python scripts/results/two_subjects.py [--seeds 0 1 2] [--recipe configs/quickstart.yaml]

The star of the quickstart is a purple and yellow one with stripes and a face; the second subject is
a blue and white heart with dots. Each has five drawings, a rare word and class pictures of its own.
The judge reads what each prompt gives. A run that is there already is measured again, not trained.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from small_world.judge import Judge, load_judge
from small_world.measure import load_pipeline, sample
from small_world.two_subjects import OTHERS, WORDS, make_prompts, read_marks, thing, verdict
from small_world.world import BACKGROUNDS, draw
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.run import run
from trainers.run_folder import WEIGHT_NAME

NUM_DRAWINGS = 5
DRAWING_SEED = 200
PLACED = (1, 2, 4)  # the drawings whose captions name their place


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    judge, rows = load_judge(), []
    arms = {"both": tuple(WORDS)} | (
        {shape: (shape,) for shape in WORDS} if arguments.alone else {}
    )
    for seed in arguments.seeds:
        for arm, shapes in arms.items():
            metrics = measure(arguments, seed, arm, shapes, judge)
            for name, figures in metrics.items():
                rows.append([seed, arm, name, *figures.values(), verdict(name, figures, shapes)])
    print_table(["seed", "learnt", "prompt", *next(iter(metrics.values())), ""], rows)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "The config of a small base, whose subject is replaced."
    parser.add_argument("--recipe", default="configs/quickstart.yaml", help=help)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of the runs.")
    help = "Steps of each run. By default 1,600, twice those of one subject."
    parser.add_argument("--steps", type=positive_int, default=1600, help=help)
    help = "Class pictures of each subject."
    parser.add_argument("--class-images", type=positive_int, default=64, help=help)
    parser.add_argument("--samples", type=positive_int, default=24, help="Of each prompt.")
    parser.add_argument("--alone", action="store_true", help="Train each subject alone too.")
    help = "The folder for drawings, runs and figures."
    parser.add_argument("--out", type=Path, default=Path("runs/two_subjects"), help=help)
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, seed: int, arm: str, shapes: tuple[str, ...], judge: Judge
) -> dict[str, dict[str, float]]:
    """Train unless it was trained before, and read the samples of each prompt; figures.json has it
    too."""
    folder = arguments.out / f"{arm}-seed{seed}"
    concepts = [make_concept(shape, arguments) for shape in shapes]
    nothing = ["instance_data_dir", "instance_prompt", "class_prompt"]
    config = load_config(
        arguments.recipe,
        [
            *(f"data.{key}=null" for key in nothing),
            "data.num_class_images=0",
            "data.prior=class_images",
            "data.preserve_prompts=[]",
            f"data.concepts={json.dumps(concepts)}",
            f"train.max_train_steps={arguments.steps * len(shapes) // len(WORDS)}",
            f"seed={seed}",
            f"output_dir={folder}",
            "validation.prompts=[]",
        ],
    )
    if not (folder / WEIGHT_NAME).exists():
        run(config)
    pipeline, figures = load_pipeline(config, lora=True), {}
    for i, (name, prompt) in enumerate(make_prompts().items()):
        pictures = sample(pipeline, config, [prompt] * arguments.samples, 1000 * i)
        figures[name] = read_marks(judge.read(pictures)[0])
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def make_concept(shape: str, arguments: argparse.Namespace) -> dict:
    """A subject's part of the config, with its drawings, which are written."""
    folder, rng = arguments.out / "drawings" / shape, np.random.default_rng(DRAWING_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    prompt = f"a photo of a {WORDS[shape]} {shape}"
    for i, background in enumerate([*BACKGROUNDS][:NUM_DRAWINGS]):
        draw(thing(shape, background), rng).save(folder / f"{i}.png")
        if i in PLACED:
            (folder / f"{i}.txt").write_text(f"{prompt} {background}\n")
    prompts = [
        text for other in OTHERS for text in (f"a photo of a {shape}", f"a photo of {other}")
    ]
    return {
        "name": shape,
        "instance_data_dir": str(folder),
        "instance_prompt": prompt,
        "class_prompt": prompts,
        "num_class_images": arguments.class_images,
        # every run draws the same ones
        "class_data_dir": str(arguments.out / "class" / shape),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
