"""Speed and memory of LoRA training beside the diffusers example scripts, in turns (docs/performance.md).

python scripts/benchmark [--family sd15 sd3 flux] [--size tiny mid true] [--peer DIFFUSERS/examples/dreambooth]

Every arm is a process of its own, started by `accelerate launch` as users do, on the same random weights and photos,
with the same rank, layers, AdamW, precision, picture size, batch, tokens and seed. First our loss and gradients must
equal an independent step's: without that there are no figures. Without --peer there are only ours.
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
from benchmark.report import machine, plot, table, threads
from trainers.cli import exit_status, parser_of, positive
from trainers.data.pictures import image_files
from trainers.distributed.accelerator import best_device
from trainers.errors import RunFailedError, UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RANK, RATE = 16, 1e-4
SCRIPTS = {"sd15": "lora", "sd3": "lora_sd3", "flux": "lora_flux"}
BEST = {"sd15": ["--pre_compute_text_embeddings"], "sd3": ["--cache_latents"], "flux": ["--cache_latents"]}
ENCODES_EACH_STEP = """\
                    else:
                        prompt_embeds, pooled_prompt_embeds, text_ids = compute_text_embeddings(
                            prompts, text_encoders, tokenizers
                        )
"""
ENCODED_ONCE = """\
                    else:
                        prompt_embeds = instance_prompt_hidden_states.repeat(elems_to_repeat, 1, 1)
                        pooled_prompt_embeds = instance_pooled_prompt_embeds.repeat(elems_to_repeat, 1)
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
    parser = parser_of(__doc__)
    parser.add_argument("--family", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument(
        "--size", nargs="+", choices=STEPS, default=["tiny"], help="true: the released configs, for a GPU"
    )
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="options of ours, each its own arm")
    parser.add_argument("--peer", type=Path, help="examples/dreambooth of a diffusers checkout")
    parser.add_argument("--peer-path", type=Path, help="folder that only the peer's processes find modules in")
    parser.add_argument("--workers", type=int, default=0, help="of the peer's DataLoader, where flags are the best")
    parser.add_argument("--photos", type=Path, help="folder; default: drawn, twice the resolution")
    parser.add_argument("--rounds", type=int, default=3, help="0: the parity gate alone")
    parser.add_argument("--steps", type=positive, help=f"default: {STEPS}")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best_device().type)
    parser.add_argument("--precision", choices=["no", "bf16"], help="default: bf16 on cuda")
    parser.add_argument("--peak-tflops", type=float, help="what MFU is a share of; default: a measured matrix product")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    chosen = parser.parse_args()
    chosen.precision = chosen.precision or ("bf16" if chosen.device == "cuda" else "no")
    if chosen.peer and not (chosen.peer / "train_dreambooth_lora.py").exists():
        raise UserError(f"--peer {chosen.peer}: not the folder examples/dreambooth of a diffusers checkout")
    if chosen.peer and "flux" in chosen.family:
        mended(chosen.peer)
    results = {
        "machine": machine(chosen.device),
        "arguments": {k: str(v) for k, v in vars(chosen).items()},
        "cases": {},
    }
    for size in chosen.size:
        for family in chosen.family:
            folder = (chosen.out / f"{family}-{size}").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            results["cases"][f"{family} {size}"] = case(chosen, family, size, folder)
            (chosen.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    plot(results, chosen.out / "benchmark.png")
    return int(not all(check["equal"] for found in results["cases"].values() for check in found["checks"].values()))


def case(chosen: Namespace, family: str, size: str, folder: Path) -> dict:
    """The checks of ours, and the rounds of every arm; of those alone whose check holds."""
    steps, shape = chosen.steps or STEPS[size], SIZES[family][size]
    photos, base, config = (chosen.photos or folder / "photos").resolve(), folder / "base", folder / "config.yaml"
    shutil.rmtree(base, ignore_errors=True)
    if not chosen.photos:
        make_photos(photos, shape.resolution)
    if not image_files(photos):
        raise UserError(f"--photos {photos}: no pictures there")
    settings = {
        "model": {"family": family, "pretrained_model_name_or_path": str(base)},
        "lora": {"rank": RANK, "target_modules": TARGETS[family]},
        "data": {"instance_data_dir": str(photos), "instance_prompt": PROMPT, "resolution": shape.resolution},
        "optimizer": {"learning_rate": RATE},
        "train": {"max_train_steps": steps, "train_batch_size": chosen.batch},
    }
    if family != "sd15":
        settings["model"]["max_sequence_length"] = shape.t5_tokens
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "check")}))
    found, arms = {"steps": steps, "checks": {}, "rounds": {}}, []
    for options in [[], *(wish.split(",") for wish in chosen.ours)]:
        arm = Arm(", ".join(["ours", *options]), ROOT / "scripts/train.py", [str(config), *options])
        out = folder / "check.json"
        check = [str(config), family, size, str(out), *options]
        measure(Arm("check", HERE / "check.py", check, str(ROOT / "scripts")), chosen, folder)
        found["checks"][arm.name] = json.loads(out.read_text())
        print(f"{family} {size}, {arm.name}: {found['checks'][arm.name]}", flush=True)
        if found["checks"][arm.name]["equal"]:
            arms.append(arm)
    if not found["checks"]["ours"]["equal"]:
        return found
    with tempfile.TemporaryDirectory() as aside:
        arms += peers(chosen, family, settings, Path(aside)) if chosen.peer else []
        for _ in range(chosen.rounds):
            for arm in arms:
                try:
                    row = figures(measure(arm, chosen, folder), found, chosen)
                    print(f"{family} {size}, {arm.name}: {row}", flush=True)
                    found["rounds"].setdefault(arm.name, []).append(row)
                except RunFailedError as error:
                    if arm.script.name == "train.py":
                        raise
                    print(error, flush=True)
    shutil.rmtree(base)
    return found


def peers(chosen: Namespace, family: str, settings: dict, aside: Path) -> list[Arm]:
    """The script by its README's flags, by its best ones, and for Flux without encoding the prompt at each step."""
    script = chosen.peer.resolve() / f"train_dreambooth_{SCRIPTS[family]}.py"
    given = {
        "pretrained_model_name_or_path": settings["model"]["pretrained_model_name_or_path"],
        "instance_data_dir": settings["data"]["instance_data_dir"],
        "instance_prompt": PROMPT,
        "resolution": settings["data"]["resolution"],
        "train_batch_size": chosen.batch,
        "max_train_steps": settings["train"]["max_train_steps"],
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 1e-2,
        "rank": RANK,
        "seed": 0,
        "mixed_precision": chosen.precision,
    }
    if family != "sd15":
        given["max_sequence_length"] = settings["model"]["max_sequence_length"]
    if family == "flux":
        given |= {"lora_alpha": RANK, "guidance_scale": 1}
    readme = [f"--{name}={value}" for name, value in given.items()] + ["--center_crop"]
    best = readme + BEST[family] * (family != "sd3" or chosen.precision == "no")  # in half precision that flag crashes
    best += ["--allow_tf32"] * (chosen.device == "cuda") + [f"--dataloader_num_workers={chosen.workers}"]
    arms = [Arm("README flags", script, readme), Arm("best flags", script, best)]
    if family == "flux":
        copy = aside / script.name
        copy.write_text(mended(chosen.peer))
        arms.append(Arm("best flags, mended", copy, best))
    path = str(chosen.peer_path.resolve()) if chosen.peer_path else ""
    return [Arm(arm.name, arm.script, arm.arguments, path) for arm in arms]


def mended(peer: Path) -> str:
    """The script for Flux, the prompt being encoded once. Raises: UserError when it is another version."""
    script = peer / "train_dreambooth_lora_flux.py"
    text = script.read_text()
    if text.count(ENCODES_EACH_STEP) != 1:
        raise UserError(f"{script} is not as expected: where it encodes the prompt at each step was not found")
    return text.replace(ENCODES_EACH_STEP, ENCODED_ONCE)


def measure(arm: Arm, chosen: Namespace, folder: Path, limit: float = 3600) -> dict:
    """What one process did: `clock.py`'s record, when it was launched and ended, peak memory with its children's."""
    run, clock, log = folder / "run", folder / "clock.json", folder / f"{arm.name.replace(' ', '-')}.log"
    shutil.rmtree(run, ignore_errors=True)
    clock.unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += [
        f"--mixed_precision={chosen.precision}",
        "--dynamo_backend=no",
        f"--num_cpu_threads_per_process={threads()}",
    ]
    command += ["--cpu"] * (chosen.device == "cpu") + [str(HERE / "clock.py"), str(arm.script), *arm.arguments]
    if arm.name != "check":
        command.append(f"output_dir={run}" if arm.script.name == "train.py" else f"--output_dir={run}")
    paths = [path for path in (arm.path, os.environ.get("PYTHONPATH", "")) if path]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "BENCHMARK_CLOCK": str(clock),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    peak, launched = 0, time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.time() < launched + limit:
                peak = max(peak, resident(process.pid))
                time.sleep(0.1)
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                child.kill()
            process.kill()
    ended = time.time()
    shutil.rmtree(run, ignore_errors=True)
    if process.returncode or not clock.exists():
        raise RunFailedError(f"{arm.name} failed, status {process.returncode}; {log} ends:\n{log.read_text()[-1500:]}")
    record = json.loads(clock.read_text())
    return record | {"launched": launched, "ended": ended, "peak_rss": max(peak, record["peak_rss"])}


def resident(pid: int) -> int:
    """Bytes of all processes below the launcher's."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            total += child.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def figures(record: dict, found: dict, chosen: Namespace) -> dict[str, float]:
    """Steady is the median of the steps after the first ten, or the first third."""
    steps, launched, batch = record["steps"], record["launched"], chosen.batch
    if len(steps) != found["steps"]:
        raise RunFailedError(f"{len(steps)} optimiser steps were seen, not {found['steps']}")
    lengths = [after - before for before, after in pairwise(steps)]
    first = min(10, len(lengths) // 3)
    steady = statistics.median(lengths[first:])
    wanted = -(-100 // batch)
    last = steps[min(wanted, len(steps)) - 1] + max(0, wanted - len(steps)) * steady
    peak = 1e12 * (chosen.peak_tflops or found["checks"]["ours"]["matmul_tflops"])
    memory = record["peak_allocated"] if chosen.device == "cuda" else record["peak_rss"]
    row = {
        "loaded": record["ready"] - launched,
        "first": steps[0] - launched,
        "step": 1000 * steady,
        "cpu": 1000 * statistics.median(after - before for before, after in pairwise(record["cpu"][first:])),
        "rate": batch / steady,
        "hundred": last - launched,
        "whole": record["ended"] - launched,
        "memory": memory / 2**30,
        "mfu": 100 * batch * found["checks"]["ours"]["flops"]["denoiser"] / steady / peak,
    }
    row["peak_rss"] = record["peak_rss"] / 2**30
    if chosen.device == "cuda":
        row["peak_reserved"] = record["peak_reserved"] / 2**30
    return {name: round(value, 3) for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(exit_status(main))
