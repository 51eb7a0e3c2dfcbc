"""A config becomes a finished run: the story, in order."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

from accelerate import Accelerator

from trainers import dreambooth
from trainers.autoencoder import Autoencoder
from trainers.config import Config, loading
from trainers.distributed.accelerator import make_accelerator
from trainers.distributed.collectives import Crew, on_main
from trainers.distributed.fsdp import Shard
from trainers.errors import RunFailedError, UserError, tolerated
from trainers.gan import Gan
from trainers.publishing.hub import Push, check_access
from trainers.publishing.report import write_report
from trainers.run_folder import claimed, write_whole
from trainers.training.auto_batch import fit_in_memory
from trainers.training.callbacks import Checkpoint, Log, Sample
from trainers.training.checkpoint import State, relevant, resume, save_checkpoint
from trainers.training.failures import explained
from trainers.training.loop import Batches, Task, train
from trainers.training.nonfinite import DivergenceError, Guard
from trainers.training.optimizers import make_rate
from trainers.unet import UNetTask

TASKS = {"dreambooth": dreambooth.build, "autoencoder": Autoencoder.build, "gan": Gan.build, "unet": UNetTask.build}


def run(settings: Config) -> None:
    """Train, export, prove, sample, describe and, if asked, upload. Everything is in `settings.output_dir`."""
    accelerator, shard = make_accelerator(settings)
    with ExitStack() as claims, explained(settings, accelerator.num_processes):
        repo = on_main(accelerator, lambda: check_access(settings))
        on_main(accelerator, lambda: claims.enter_context(claimed(settings.output_dir)))
        tell(settings, accelerator, shard, repo)


def tell(settings: Config, accelerator: Accelerator, shard: Shard | None, repo: str | None) -> None:
    for preset, values in settings.chosen.items():
        accelerator.print(preset, "is", *(f"{path}={value}" for path, value in values.items()))
    build, crew, main = TASKS[settings.kind], Crew(accelerator), accelerator.is_main_process
    task, batches, data = build(settings, accelerator, shard) if shard else build(settings, accelerator)
    facts = relevant(settings, accelerator.num_processes, data)
    state = resume(settings, task, accelerator, facts)
    newest, oldest = crew.agree(state.step, -state.step)
    if newest != -oldest:
        raise UserError(f"output_dir: processes find other checkpoints: {settings.output_dir} must be on a shared disk")
    if main:
        write_whole(settings.output_dir / "config.yaml", loading.dump(settings))
    with tolerated("the tracker"):
        accelerator.init_trackers(settings.tracking.project_name)
    if settings.train.auto_micro_batch:
        fit_in_memory(task, batches, settings, crew, state.step)
    push = Push(task, settings, repo)
    while True:
        try:
            learn(task, batches, settings, crew, state, push)
            break
        except DivergenceError as error:
            state = recover(error, task, settings, accelerator, facts, state.rollbacks)
    if main or task.joint:
        task.finish()
    if main:
        write_report(settings.output_dir)
        if repo:
            write_report(settings.output_dir, pictures=False)
        accelerator.print(f"done: {settings.output_dir}")
    accelerator.wait_for_everyone()
    with tolerated("the tracker"):
        accelerator.end_training()
    push.finish()


def learn(task: Task, batches: Batches, settings: Config, crew: Crew, state: State, push: Push) -> None:
    """From the state to the last step. Raises: DivergenceError."""
    accelerator, peak = crew.accelerator, make_rate(settings.optimizer, settings.train.max_train_steps)

    def rate(step: int) -> float:
        return peak(step) * 0.5**state.rollbacks

    log = Log(settings, accelerator, rate, state.step)
    observers = [
        *task.observers,
        Guard(task, batches, settings, accelerator),
        log,
        Sample(task, settings, accelerator),
        Checkpoint(task, settings, crew, state),
        push,
    ]
    try:
        train(task, batches, settings.train, settings.seed, accelerator, rate, observers, state.step)
    finally:
        log.bar.close()


def recover(
    error: DivergenceError, task: Task, settings: Config, accelerator: Accelerator, facts: dict, rollbacks: int
) -> State:
    """The state of the last checkpoint that was trained from without fail, at half the learning rate."""
    advice = "Lower optimizer.learning_rate, or use mixed precision bf16 instead of fp16"
    if settings.train.on_divergence == "stop":
        raise RunFailedError(f"{error}. {advice}; the same command then needs another output_dir") from None
    state = resume(settings, task, accelerator, facts, before=error.first - 1)
    state.rollbacks = rollbacks + 1
    if state.step == 0:
        raise RunFailedError(f"{error}. There is no checkpoint from before that to go back to. {advice}") from None
    save_checkpoint(settings, state.step, task, accelerator, state)  # a run that is killed now keeps the halved rate
    warnings.warn(f"{error}. Back to step {state.step}, at half the learning rate", stacklevel=2)
    return state
