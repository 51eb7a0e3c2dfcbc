"""Measure in a process of its own: parity, FLOPs, the rate of a matrix product, the overhead.

python check.py CONFIG FAMILY SIZE OUT [KEY=VALUE ...]   started by `accelerate launch` as the
training is
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from benchmark import bases
from benchmark.flops import costs
from benchmark.parity import ALPHA, DTYPES, parity
from benchmark.sizes import SIZES
from trainers import dreambooth
from trainers.cli import silence_libraries
from trainers.config import DreamBoothConfig, loading
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.distributed.accelerator import best_device, make_accelerator
from trainers.distributed.trained_weights import trainable_parameters
from trainers.memory_plan import matmul_rate, time_call
from trainers.training.callbacks import LogMetrics
from trainers.training.loop import train
from trainers.training.nonfinite import NonfiniteGuard
from trainers.training.optimizers import make_lr_schedule

# the overhead is measured in chunks of steps, ours and bare ones in turns
CHUNKS = 40
STEPS_PER_CHUNK = 10


def main() -> None:
    path, family, size, out, *overrides = sys.argv[1:]
    silence_libraries()
    # a config whose base is not there is a mistake
    base = Path(loading.read_tree(Path(path))["model"]["pretrained_model_name_or_path"])
    if not base.exists():
        bases.make_base(family, size, base, best_device())
    settings = loading.load_config(path, [f"lora.alpha={ALPHA}", *overrides])
    accelerator, _ = make_accelerator(settings)
    clear_device_cache(garbage_collection=True)
    accelerator.init_trackers(settings.tracking.project_name)
    task, batches, _ = dreambooth.build(settings, accelerator)
    # of true size its weights in float32 do not fit beside ours
    result = parity(settings, task, batches, accelerator, has_float32=size != "true")
    if result["equal"] and not overrides:
        result["flops"] = costs(family, SIZES[family][size])
        dtype = DTYPES[accelerator.mixed_precision]
        result["matmul_tflops"] = matmul_rate(accelerator.device, dtype) / 1e12
        if size == "tiny":
            result["overhead_ms"] = overhead(settings, task, batches, accelerator)
    Path(out).write_text(json.dumps(result))


def overhead(
    settings: DreamBoothConfig,
    task: dreambooth.DreamBooth,
    batches: DreamBoothBatches,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Milliseconds per step of the loop with its log and its guard, and of a bare step.

    The bare one is forward, backward and AdamW on the same module, with one batch that is noisy
    already. Medians of both, and of what one turn of the loop takes over the bare one after it.
    """
    batch, rng = next(iter(batches(0)))
    with torch.no_grad():
        x0 = task.family.latents(batch["moments"], rng)
        objective = task.objective(x0.shape[-2:])
        eps, t = rng.normal(x0.shape), objective.times(rng)
        x_t, target = objective.corrupt(x0, eps, t), objective.target(x0, eps, t)
    module = task.players["denoiser"].module
    optimizer = torch.optim.AdamW(trainable_parameters(task.module).values(), lr=1e-4, fused=True)
    rate = make_lr_schedule(settings.optimizer, settings.train.max_train_steps)
    guard = NonfiniteGuard(task, batches, settings, accelerator)
    callbacks = [guard, LogMetrics(settings, accelerator, rate, 0)]

    def run_loop(first: int) -> None:
        once = settings.train.model_copy(update={"max_train_steps": first + STEPS_PER_CHUNK})
        train(task, batches, once, settings.seed, accelerator, rate, callbacks, first)

    def run_bare(first: int) -> None:
        for _ in range(STEPS_PER_CHUNK):
            F.mse_loss(module(x_t, t, batch["text"]).float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    milliseconds = {"loop": [], "bare": [], "over": []}
    for first in range(0, CHUNKS * STEPS_PER_CHUNK, STEPS_PER_CHUNK):
        for name, run in (("loop", run_loop), ("bare", run_bare)):
            seconds = time_call(lambda run=run, first=first: run(first), accelerator.device)
            milliseconds[name].append(1000 * seconds / STEPS_PER_CHUNK)
        milliseconds["over"].append(milliseconds["loop"][-1] - milliseconds["bare"][-1])
    # the first ones warm up
    return {name: statistics.median(ms[CHUNKS // 4 :]) for name, ms in milliseconds.items()}


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    main()
