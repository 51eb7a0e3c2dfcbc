"""A config becomes a finished run: the story, in order."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from . import UserError, config, dreambooth
from .autoencoder import Autoencoder
from .checkpoint import relevant, resume
from .gan import Gan
from .loop import train
from .observers import Checkpoint, Log, Sample
from .optim import make_rate
from .push import Push, check_access
from .report import write_report
from .sections import Config
from .unet import UNetTask

TASKS = {"dreambooth": dreambooth.build, "autoencoder": Autoencoder.build, "gan": Gan.build, "unet": UNetTask.build}


def run(settings: Config) -> None:
    """Train, export, prove, sample, describe and, if asked, upload. Everything is in `settings.output_dir`."""
    accelerator = make_accelerator(settings)
    repo = check_access(settings) if accelerator.is_main_process else None
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    task, batches, data = TASKS[settings.kind](settings, accelerator)
    facts = relevant(settings, accelerator.num_processes, data)
    start = resume(folder / "checkpoints", settings.checkpoint.resume_from_checkpoint, task, accelerator, facts)
    if accelerator.is_main_process:
        (folder / "config.yaml").write_text(config.dump(settings))
    if settings.tracking.report_to:
        accelerator.init_trackers(settings.tracking.project_name)
    rate = make_rate(settings.optimizer, settings.train.max_train_steps)
    log, push = Log(settings, accelerator, rate, start), Push(task, settings, repo)
    observers = [
        *task.observers,
        log,
        Sample(task, settings, accelerator),
        Checkpoint(task, settings, accelerator, facts),
        push,
    ]
    train(task, batches, settings.train, settings.seed, accelerator, rate, observers, start)
    log.bar.close()
    if accelerator.is_main_process:
        task.finish()
        write_report(folder)
        if repo:
            write_report(folder, pictures=False)
        accelerator.print(f"done: {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    push.finish()


def make_accelerator(settings: Config) -> Accelerator:
    """Raises: UserError when the launcher was asked for more processes than it started."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=settings.train.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # while one process samples or exports
        log_with=settings.tracking.report_to or None,
        project_config=ProjectConfiguration(str(settings.output_dir), str(settings.output_dir / "tracking")),
    )
    # `accelerate launch --cpu --num_processes 2` sets MASTER_PORT for two processes and then starts one
    wanted = int(os.environ.get("WORLD_SIZE", 2 if "MASTER_PORT" in os.environ else 1))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {'several processes' if 'WORLD_SIZE' not in os.environ else wanted}, but each "
            f"sees {accelerator.num_processes}. On a CPU use: accelerate launch --multi_gpu --num_processes 2 ..."
        )
    return accelerator
