"""Speed and memory of LoRA training beside the diffusers example scripts, in turns
(docs/performance.md).

python scripts/benchmark [--family sd15 sd3 flux] [--size tiny mid true] [--peer
DIFFUSERS/examples/dreambooth]

Every arm is a process of its own, started by `accelerate launch` as users do, on the same random
weights and photos, with the same rank, layers, AdamW, precision, picture size, batch, tokens and
seed. First our loss and gradients must equal an independent step's: without that there are no
figures. Without --peer there are only ours.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.bases import PROMPT, SIZES, TARGETS, make_photos
from benchmark.report import machine, plot, results_table, threads
from trainers.cli import make_parser, positive_int, run_main
from trainers.data.pictures import list_image_files
from trainers.distributed.accelerator import best_device
from trainers.errors import RunFailedError, UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RANK, RATE = 16, 1e-4
SCRIPTS = {"sd15": "lora", "sd3": "lora_sd3", "flux": "lora_flux"}
BEST = {
    "sd15": ["--pre_compute_text_embeddings"],
    "sd3": ["--cache_latents"],
    "flux": ["--cache_latents"],
}
ENCODES_EACH_STEP = """\
                    else:
                        prompt_embeds, pooled_prompt_embeds, text_ids = compute_text_embeddings(
                            prompts, text_encoders, tokenizers
                        )
"""
ENCODED_ONCE = """\
                    else:
                        prompt_embeds = instance_prompt_hidden_states.repeat(elems_to_repeat, 1, 1)
                        pooled_prompt_embeds = instance_pooled_prompt_embeds.repeat(
                            elems_to_repeat, 1
                        )
                        text_ids = instance_text_ids
"""
STEPS = {"tiny": 100, "mid": 16, "true": 40}


@dataclass
class Arm:
    name: str
    script: Path
    arguments: list[str]
    path: str = ""  # what PYTHONPATH begins with


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--family", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument(
        "--size",
        nargs="+",
        choices=STEPS,
        default=["tiny"],
        help="true: the released configs, for a GPU",
    )
    parser.add_argument(
        "--ours",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of ours, each its own arm",
    )
    parser.add_argument("--peer", type=Path, help="examples/dreambooth of a diffusers checkout")
    parser.add_argument(
        "--peer-path", type=Path, help="folder that only the peer's processes find modules in"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="of the peer's DataLoader, where flags are the best"
    )
    parser.add_argument("--photos", type=Path, help="folder; default: drawn, twice the resolution")
    parser.add_argument("--rounds", type=int, default=3, help="0: the parity gate alone")
    parser.add_argument("--steps", type=positive_int, help=f"default: {STEPS}")
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best_device().type)
    parser.add_argument("--precision", choices=["no", "bf16"], help="default: bf16 on cuda")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="what MFU is a share of; default: a measured matrix product",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "no")
    if arguments.peer and not (arguments.peer / "train_dreambooth_lora.py").exists():
        raise UserError(
            f"--peer {arguments.peer}: not the folder examples/dreambooth of a diffusers checkout"
        )
    if arguments.peer and "flux" in arguments.family:
        patch_flux_script(arguments.peer)
    results = {
        "machine": machine(arguments.device),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "cases": {},
    }
    for size in arguments.size:
        for family in arguments.family:
            folder = (arguments.out / f"{family}-{size}").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            results["cases"][f"{family} {size}"] = run_case(arguments, family, size, folder)
            (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    print(results_table(results))
    plot(results, arguments.out / "benchmark.png")
    return int(
        not all(
            check["equal"]
            for found in results["cases"].values()
            for check in found["checks"].values()
        )
    )


def run_case(arguments: Namespace, family: str, size: str, folder: Path) -> dict:
    """The checks of ours, and the rounds of every arm; of those alone whose check holds."""
    steps, shape = arguments.steps or STEPS[size], SIZES[family][size]
    photos, base, config = (
        (arguments.photos or folder / "photos").resolve(),
        folder / "base",
        folder / "config.yaml",
    )
    shutil.rmtree(base, ignore_errors=True)
    if not arguments.photos:
        make_photos(photos, shape.resolution)
    if not list_image_files(photos):
        raise UserError(f"--photos {photos}: no pictures there")
    settings = {
        "model": {"family": family, "pretrained_model_name_or_path": str(base)},
        "lora": {"rank": RANK, "target_modules": TARGETS[family]},
        "data": {
            "instance_data_dir": str(photos),
            "instance_prompt": PROMPT,
            "resolution": shape.resolution,
        },
        "optimizer": {"learning_rate": RATE},
        "train": {"max_train_steps": steps, "train_batch_size": arguments.batch},
    }
    if family != "sd15":
        settings["model"]["max_sequence_length"] = shape.t5_tokens
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "check")}))
    result, arms = {"steps": steps, "checks": {}, "rounds": {}}, []
    for options in [[], *(options_text.split(",") for options_text in arguments.ours)]:
        arm = Arm(", ".join(["ours", *options]), ROOT / "scripts/train.py", [str(config), *options])
        out = folder / "check.json"
        check = [str(config), family, size, str(out), *options]
        run_arm(Arm("check", HERE / "check.py", check, str(ROOT / "scripts")), arguments, folder)
        result["checks"][arm.name] = json.loads(out.read_text())
        print(f"{family} {size}, {arm.name}: {result['checks'][arm.name]}", flush=True)
        if result["checks"][arm.name]["equal"]:
            arms.append(arm)
    if not result["checks"]["ours"]["equal"]:
        return result
    with tempfile.TemporaryDirectory() as temporary:
        arms += peer_arms(arguments, family, settings, Path(temporary)) if arguments.peer else []
        for _ in range(arguments.rounds):
            for arm in arms:
                try:
                    row = arm_metrics(run_arm(arm, arguments, folder), result, arguments)
                    print(f"{family} {size}, {arm.name}: {row}", flush=True)
                    result["rounds"].setdefault(arm.name, []).append(row)
                except RunFailedError as error:
                    if arm.script.name == "train.py":
                        raise
                    print(error, flush=True)
    shutil.rmtree(base)
    return result


def peer_arms(arguments: Namespace, family: str, settings: dict, temporary: Path) -> list[Arm]:
    """The script by its README's flags, by its best ones, and for Flux without encoding the prompt
    at each step."""
    script = arguments.peer.resolve() / f"train_dreambooth_{SCRIPTS[family]}.py"
    flags = {
        "pretrained_model_name_or_path": settings["model"]["pretrained_model_name_or_path"],
        "instance_data_dir": settings["data"]["instance_data_dir"],
        "instance_prompt": PROMPT,
        "resolution": settings["data"]["resolution"],
        "train_batch_size": arguments.batch,
        "max_train_steps": settings["train"]["max_train_steps"],
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 1e-2,
        "rank": RANK,
        "seed": 0,
        "mixed_precision": arguments.precision,
    }
    if family != "sd15":
        flags["max_sequence_length"] = settings["model"]["max_sequence_length"]
    if family == "flux":
        flags |= {"lora_alpha": RANK, "guidance_scale": 1}
    readme = [f"--{name}={value}" for name, value in flags.items()] + ["--center_crop"]
    # in half precision that flag crashes
    best = readme + BEST[family] * (family != "sd3" or arguments.precision == "no")
    best += ["--allow_tf32"] * (arguments.device == "cuda") + [
        f"--dataloader_num_workers={arguments.workers}"
    ]
    arms = [Arm("README flags", script, readme), Arm("best flags", script, best)]
    if family == "flux":
        copy = temporary / script.name
        copy.write_text(patch_flux_script(arguments.peer))
        arms.append(Arm("best flags, mended", copy, best))
    path = str(arguments.peer_path.resolve()) if arguments.peer_path else ""
    return [Arm(arm.name, arm.script, arm.arguments, path) for arm in arms]


def patch_flux_script(peer: Path) -> str:
    """The script for Flux, the prompt being encoded once. Raises: UserError when it is another
    version."""
    script = peer / "train_dreambooth_lora_flux.py"
    text = script.read_text()
    if text.count(ENCODES_EACH_STEP) != 1:
        raise UserError(
            f"{script} is not as expected: where it encodes the prompt at each step was not found"
        )
    return text.replace(ENCODES_EACH_STEP, ENCODED_ONCE)


def run_arm(arm: Arm, arguments: Namespace, folder: Path, limit: float = 3600) -> dict:
    """What one process did: `clock.py`'s record, when it was launched and ended, peak memory with
    its children's."""
    run, clock, log = (
        folder / "run",
        folder / "clock.json",
        folder / f"{arm.name.replace(' ', '-')}.log",
    )
    shutil.rmtree(run, ignore_errors=True)
    clock.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        "--num_machines=1",
    ]
    command += [
        f"--mixed_precision={arguments.precision}",
        "--dynamo_backend=no",
        f"--num_cpu_threads_per_process={threads()}",
    ]
    command += ["--cpu"] * (arguments.device == "cpu") + [
        str(HERE / "clock.py"),
        str(arm.script),
        *arm.arguments,
    ]
    if arm.name != "check":
        command.append(
            f"output_dir={run}" if arm.script.name == "train.py" else f"--output_dir={run}"
        )
    paths = [path for path in (arm.path, os.environ.get("PYTHONPATH", "")) if path]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "BENCHMARK_CLOCK": str(clock),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    peak, launched = 0, time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None and time.time() < launched + limit:
                peak = max(peak, resident_bytes(process.pid))
                time.sleep(0.1)
        finally:
            for child in (
                psutil.Process(process.pid).children(recursive=True)
                if process.poll() is None
                else ()
            ):
                child.kill()
            process.kill()
    ended = time.time()
    shutil.rmtree(run, ignore_errors=True)
    if process.returncode or not clock.exists():
        raise RunFailedError(
            f"{arm.name} failed, status {process.returncode}; {log} "
            f"ends:\n{log.read_text()[-1500:]}"
        )
    record = json.loads(clock.read_text())
    return record | {
        "launched": launched,
        "ended": ended,
        "peak_rss": max(peak, record["peak_rss"]),
    }


def resident_bytes(pid: int) -> int:
    """Bytes of all processes below the launcher's."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            total += child.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def arm_metrics(record: dict, case_result: dict, arguments: Namespace) -> dict[str, float]:
    """Steady is the median of the steps after the first ten, or the first third."""
    steps, launched, batch = record["steps"], record["launched"], arguments.batch
    if len(steps) != case_result["steps"]:
        raise RunFailedError(f"{len(steps)} optimiser steps were seen, not {case_result['steps']}")
    lengths = [after - before for before, after in pairwise(steps)]
    first = min(10, len(lengths) // 3)
    steady = statistics.median(lengths[first:])
    wanted = -(-100 // batch)
    last = steps[min(wanted, len(steps)) - 1] + max(0, wanted - len(steps)) * steady
    peak = 1e12 * (arguments.peak_tflops or case_result["checks"]["ours"]["matmul_tflops"])
    memory = record["peak_allocated"] if arguments.device == "cuda" else record["peak_rss"]
    row = {
        "loaded": record["ready"] - launched,
        "first": steps[0] - launched,
        "step": 1000 * steady,
        "cpu": 1000
        * statistics.median(after - before for before, after in pairwise(record["cpu"][first:])),
        "rate": batch / steady,
        "hundred": last - launched,
        "whole": record["ended"] - launched,
        "memory": memory / 2**30,
        "mfu": 100 * batch * case_result["checks"]["ours"]["flops"]["denoiser"] / steady / peak,
    }
    row["peak_rss"] = record["peak_rss"] / 2**30
    if arguments.device == "cuda":
        row["peak_reserved"] = record["peak_reserved"] / 2**30
    return {name: round(value, 3) for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(run_main(main))
