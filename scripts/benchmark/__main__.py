"""Measure speed and memory of LoRA training beside the diffusers example scripts, in turns.

python scripts/benchmark [--family sd15 sd3 flux] [--size tiny mid true]
    [--peer DIFFUSERS/examples/dreambooth]
python scripts/benchmark --inside [--size tiny mid true] [CELL ...]

Every arm is a process of its own, started by `accelerate launch` as users do, on the same random
weights and photos, with the same rank, layers, AdamW, precision, picture size, batch, tokens and
seed. First our loss and gradients must equal an independent step's: without that there are no
figures. Without --peer there are only ours. See docs/performance.md.

With --inside all is in one process and nothing on a disk: cells of a family, a size, a batch and an
option of ours, each beside the step of the example scripts, in turns; a line of JSON for each. All
cells of true size should take 6 to 8 minutes on an H100 or H200 (estimated, docs/performance.md).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.arms import RATE, SCRIPTS, Arm, patch_flux_script, peer_arms
from benchmark.bases import make_photos
from benchmark.cells import CELLS
from benchmark.inside import run_inside
from benchmark.launch import HERE, ROOT, Launcher, Metrics
from benchmark.report import machine, plot, results_table
from benchmark.sizes import PROMPT, RANK, SIZES, TARGETS
from trainers.cli import make_parser, positive_int, run_main
from trainers.data.pictures import list_image_files
from trainers.distributed.accelerator import best_device
from trainers.errors import RunFailedError, UserError

STEPS = {"tiny": 100, "mid": 16, "true": 40}
SIZE_NAMES = ", ".join(STEPS)


def parse_arguments() -> Namespace:
    """Raises: UserError when --peer is no checkout of diffusers, or of another version."""
    parser = make_parser(__doc__)
    parser.add_argument("--family", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    help = "The true size has the released configs, for a GPU. By default tiny; true with --inside."
    parser.add_argument("--size", nargs="+", help=help, metavar=f"{{{','.join(STEPS)}}}")
    help = "Time steps in one process, ours and those of the scripts."
    parser.add_argument("--inside", action="store_true", help=help)
    help = f"With --inside: what is timed, by default all of {', '.join(CELLS)}."
    parser.add_argument("cells", nargs="*", metavar="CELL", help=help)
    help = "Options of ours, each an arm of its own."
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help=help)
    help = "The folder examples/dreambooth of a diffusers checkout."
    parser.add_argument("--peer", type=Path, help=help)
    help = "A folder that only the peer's processes find modules in."
    parser.add_argument("--peer-path", type=Path, help=help)
    help = "Workers of the peer's DataLoader, where its flags are the best."
    parser.add_argument("--workers", type=int, default=0, help=help)
    help = "A folder with photos. By default they are drawn, twice as large as the resolution."
    parser.add_argument("--photos", type=Path, help=help)
    help = "How often each arm runs; with 0 only the parity is checked."
    parser.add_argument("--rounds", type=int, default=3, help=help)
    help = f"By default {STEPS}; with --inside 3 in each of three turns."
    parser.add_argument("--steps", type=positive_int, help=help)
    parser.add_argument("--batch", type=positive_int, default=1, help="Photos per step.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best_device().type)
    help = "By default bf16 on cuda, and no elsewhere."
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help=help)
    help = "What MFU is a share of. By default the rate of a matrix product, measured here."
    parser.add_argument("--peak-tflops", type=float, help=help)
    help = "The folder for the results."
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help=help)
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: Namespace) -> None:
    """Fill in what depends on other arguments. Raises: UserError for what cannot be."""
    # cells that stand behind --size
    sizes = arguments.size or ["true" if arguments.inside else "tiny"]
    arguments.size = [word for word in sizes if word in STEPS]
    arguments.cells += [word for word in sizes if word not in STEPS]
    if arguments.cells and not arguments.inside:
        raise UserError(f"{arguments.cells[0]}: a cell needs --inside, and a size is {SIZE_NAMES}")
    if arguments.inside and not arguments.size:
        arguments.size = ["true"]
    if arguments.precision == "fp16" and arguments.device == "cpu" and not arguments.inside:
        raise UserError(
            "--precision fp16: on a CPU accelerate leaves out autocast and GradScaler, without a "
            "word, also in the scripts: use no or bf16, or --inside, which puts them in"
        )
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "no")
    if arguments.peer and not (arguments.peer / "train_dreambooth_lora.py").exists():
        expected = "the folder examples/dreambooth of a diffusers checkout"
        raise UserError(f"--peer {arguments.peer}: not {expected}")
    if arguments.peer and "flux" in arguments.family:
        patch_flux_script(arguments.peer)


def main() -> int:
    arguments = parse_arguments()
    if arguments.inside:
        return run_inside(arguments)
    cases = {}
    results = {
        "machine": machine(arguments.device),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "cases": cases,
    }
    for size in arguments.size:
        for family in arguments.family:
            folder = (arguments.out / f"{family}-{size}").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            cases[f"{family} {size}"] = run_case(arguments, family, size, folder)
            (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    print(results_table(results))
    plot(results, arguments.out / "benchmark.png")
    checks = [check for case in cases.values() for check in case["checks"].values()]
    return int(not all(check["equal"] for check in checks))


def run_case(arguments: Namespace, family: str, size: str, folder: Path) -> dict:
    """The checks of ours, and the rounds of every arm; of those alone whose check holds."""
    settings = make_settings(arguments, family, size, folder)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    launcher = Launcher(folder, arguments.device, arguments.precision)
    result = {"steps": settings["train"]["max_train_steps"], "checks": {}, "rounds": {}}
    arms = []
    for text in ["", *arguments.ours]:
        options = text.split(",") if text else []
        arm = Arm(", ".join(["ours", *options]), ROOT / "scripts/train.py", [str(config), *options])
        check = result["checks"][arm.name] = run_check(launcher, config, family, size, options)
        print(f"{family} {size}, {arm.name}: {check}", flush=True)
        if check["equal"]:
            arms.append(arm)
    if not result["checks"]["ours"]["equal"]:
        return result
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.peer:
            arms += peer_arms(arguments, family, settings, Path(temporary))
        for _ in range(arguments.rounds):
            run_round(arms, launcher, case_metrics(arguments, result), result["rounds"])
    shutil.rmtree(folder / "base")
    return result


def make_settings(arguments: Namespace, family: str, size: str, folder: Path) -> dict[str, Any]:
    """The config of ours; the photos are drawn if none are given. Raises: UserError."""
    shape = SIZES[family][size]
    photos, base = (arguments.photos or folder / "photos").resolve(), folder / "base"
    shutil.rmtree(base, ignore_errors=True)
    if not arguments.photos:
        make_photos(photos, shape.resolution)
    if not list_image_files(photos):
        raise UserError(f"--photos {photos}: no pictures there")
    model = {"family": family, "pretrained_model_name_or_path": str(base)}
    if family != "sd15":
        model["max_sequence_length"] = shape.t5_tokens
    data = {
        "instance_data_dir": str(photos),
        "instance_prompt": PROMPT,
        "resolution": shape.resolution,
    }
    steps = arguments.steps or STEPS[size]
    return {
        "output_dir": str(folder / "check"),
        "model": model,
        "lora": {"rank": RANK, "target_modules": TARGETS[family]},
        "data": data,
        "optimizer": {"learning_rate": RATE},
        "train": {"max_train_steps": steps, "train_batch_size": arguments.batch},
    }


def run_check(
    launcher: Launcher, config: Path, family: str, size: str, options: list[str]
) -> dict[str, Any]:
    """What `check.py` finds out about ours with some options."""
    out = launcher.folder / "check.json"
    command = [str(config), family, size, str(out), *options]
    launcher.run(Arm("check", HERE / "check.py", command, str(ROOT / "scripts")))
    return json.loads(out.read_text())


def case_metrics(arguments: Namespace, result: dict) -> Metrics:
    check = result["checks"]["ours"]
    peak = 1e12 * (arguments.peak_tflops or check["matmul_tflops"])
    steps, flops = result["steps"], check["flops"]["denoiser"]
    return Metrics(steps, arguments.batch, arguments.device, flops, peak)


def run_round(arms: list[Arm], launcher: Launcher, metrics: Metrics, rounds: dict) -> None:
    """Run each arm once, and add its metrics to its rounds. Raises: RunFailedError of ours."""
    for arm in arms:
        try:
            row = metrics(launcher.run(arm))
        except RunFailedError as error:
            if arm.script.name == "train.py":
                raise
            print(error, flush=True)
            continue
        print(f"{launcher.folder.name}, {arm.name}: {row}", flush=True)
        rounds.setdefault(arm.name, []).append(row)


if __name__ == "__main__":
    sys.exit(run_main(main))
