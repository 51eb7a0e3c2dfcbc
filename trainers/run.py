"""A config becomes a finished run: the story, in order."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, closing

from accelerate import Accelerator

from trainers import dreambooth
from trainers.autoencoder import Autoencoder
from trainers.config import Config, loading
from trainers.distributed.accelerator import make_accelerator
from trainers.distributed.collectives import ProcessGroup, run_on_main
from trainers.distributed.fsdp import ShardFunction
from trainers.efficiency.attention import attention_kernel
from trainers.errors import RunFailedError, UserError, warn_on_error
from trainers.gan import Gan
from trainers.publishing.hub import PushToHub, check_access
from trainers.publishing.public import TRACKER_OPTIONS
from trainers.publishing.report import write_report
from trainers.run_folder import lock_run_folder, write_atomic
from trainers.training.auto_batch import find_executable_batch_size
from trainers.training.callbacks import LogMetrics, SamplePictures, SaveCheckpoints
from trainers.training.checkpoint import RunState, resume, resume_facts, save_checkpoint
from trainers.training.failures import friendly_errors
from trainers.training.loop import Batches, Task, train
from trainers.training.nonfinite import DivergenceError, NonfiniteGuard
from trainers.training.optimizers import make_lr_schedule
from trainers.training.process_state import restored_process
from trainers.unet import UNetTask

TASKS = {
    "dreambooth": dreambooth.build,
    "autoencoder": Autoencoder.build,
    "gan": Gan.build,
    "unet": UNetTask.build,
}


def run(settings: Config) -> None:
    """Train, export, prove, sample, describe and, if asked, upload. Everything is in
    `settings.output_dir`."""
    with ExitStack() as stack:
        stack.enter_context(restored_process())
        accelerator, shard = make_accelerator(settings)
        stack.enter_context(friendly_errors(settings, accelerator.num_processes))
        repo = run_on_main(accelerator, lambda: check_access(settings))
        run_on_main(accelerator, lambda: stack.enter_context(lock_run_folder(settings.output_dir)))
        train_and_export(settings, accelerator, shard, repo)


def train_and_export(
    settings: Config, accelerator: Accelerator, shard: ShardFunction | None, repo: str | None
) -> None:
    for preset, values in settings.applied_presets.items():
        accelerator.print(preset, "is", *(f"{path}={value}" for path, value in values.items()))
    build, processes, is_main = (
        TASKS[settings.kind],
        ProcessGroup(accelerator),
        accelerator.is_main_process,
    )
    task, batches, data_digest = (
        build(settings, accelerator, shard) if shard else build(settings, accelerator)
    )
    facts = resume_facts(settings, accelerator.num_processes, data_digest)
    state = resume(settings, task, accelerator, facts)
    newest, oldest = processes.all_max(state.step, -state.step)
    if newest != -oldest:
        raise UserError(
            f"output_dir: processes find other checkpoints: {settings.output_dir} must be on a "
            f"shared disk"
        )
    if is_main:
        write_atomic(settings.output_dir / "config.yaml", loading.dump_config(settings))
    with warn_on_error("the tracker"):
        accelerator.init_trackers(settings.tracking.project_name, init_kwargs=TRACKER_OPTIONS)
    if settings.train.auto_micro_batch:
        find_executable_batch_size(task, batches, settings, processes, state.step)
    push = PushToHub(task, settings, repo)
    while True:
        try:
            train_from(task, batches, settings, processes, state, push)
            break
        except DivergenceError as error:
            state = roll_back(error, task, settings, accelerator, facts, state.rollbacks)
    if is_main or task.needs_all_processes:
        task.finish()
    if is_main:
        write_report(settings.output_dir)
        if repo:
            write_report(settings.output_dir, pictures=False)
        accelerator.print(f"done: {settings.output_dir}")
    accelerator.wait_for_everyone()
    with warn_on_error("the tracker"):
        accelerator.end_training()
    push.finish()


def train_from(
    task: Task,
    batches: Batches,
    settings: Config,
    processes: ProcessGroup,
    state: RunState,
    push: PushToHub,
) -> None:
    """From the state to the last step. Raises: DivergenceError."""
    accelerator, schedule = (
        processes.accelerator,
        make_lr_schedule(settings.optimizer, settings.train.max_train_steps),
    )

    def rate(step: int) -> float:
        return schedule(step) * 0.5**state.rollbacks

    log = LogMetrics(settings, accelerator, rate, state.step)
    callbacks = [
        *task.callbacks,
        NonfiniteGuard(task, batches, settings, accelerator),
        log,
        SamplePictures(task, settings, accelerator),
        SaveCheckpoints(task, settings, processes, state),
        push,
    ]
    with closing(log.progress_bar), attention_kernel(task.attention, accelerator.device):
        train(
            task, batches, settings.train, settings.seed, accelerator, rate, callbacks, state.step
        )


def roll_back(
    error: DivergenceError,
    task: Task,
    settings: Config,
    accelerator: Accelerator,
    facts: dict,
    rollbacks: int,
) -> RunState:
    """The state of the last checkpoint that was trained from without fail, at half the learning
    rate."""
    advice = "Lower optimizer.learning_rate, or use mixed precision bf16 instead of fp16"
    if settings.train.on_divergence == "stop":
        raise RunFailedError(
            f"{error}. {advice}; the same command then needs another output_dir"
        ) from None
    state = resume(settings, task, accelerator, facts, before_step=error.first_step - 1)
    state.rollbacks = rollbacks + 1
    if state.step == 0:
        raise RunFailedError(
            f"{error}. There is no checkpoint from before that to go back to. {advice}"
        ) from None
    save_checkpoint(
        settings, state.step, task, accelerator, state
    )  # a run that is killed now keeps the halved rate
    warnings.warn(f"{error}. Back to step {state.step}, at half the learning rate", stacklevel=2)
    return state
