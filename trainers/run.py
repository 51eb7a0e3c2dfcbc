"""A config becomes a finished run: the story, in order."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from accelerate import Accelerator

from trainers import dreambooth
from trainers.atomic import write_atomic
from trainers.autoencoder import Autoencoder
from trainers.banners import end_banner, start_banner
from trainers.config import Config, loading
from trainers.distributed.accelerator import make_accelerator, record_precision
from trainers.distributed.collectives import ProcessGroup, run_on_main
from trainers.distributed.fsdp import ShardFunction
from trainers.efficiency.attention import attention_kernel
from trainers.efficiency.backends import training_backends
from trainers.errors import Interrupted, RunFailedError, UserError, warn_on_error
from trainers.gan import Gan
from trainers.publishing.hub import PushToHub, check_access
from trainers.publishing.live import LiveReport
from trainers.publishing.public import TRACKER_OPTIONS
from trainers.publishing.report import write_report
from trainers.run_folder import CONFIG_NAME, lock_run_folder
from trainers.training.auto_batch import find_executable_batch_size
from trainers.training.callbacks import LogMetrics, SamplePictures, SaveCheckpoints
from trainers.training.checkpoint import resume, save_checkpoint
from trainers.training.facts import Facts, resume_facts
from trainers.training.failures import friendly_errors, stop_advice
from trainers.training.loop import Batches, StopReason, Task, train
from trainers.training.nonfinite import DivergenceError, NonfiniteGuard
from trainers.training.optimizers import make_lr_schedule, try_optimizer
from trainers.training.process_state import restored_process
from trainers.training.run_state import RunState
from trainers.training.status import recorded_warnings
from trainers.training.validation import Validate
from trainers.unet import UNetTask

TASKS = {
    "dreambooth": dreambooth.build,
    "autoencoder": Autoencoder.build,
    "gan": Gan.build,
    "unet": UNetTask.build,
}


def run(settings: Config) -> None:
    """Train, export, prove, sample, describe and, if asked, upload.

    Everything is written into `settings.output_dir`.
    """
    with ExitStack() as stack:
        stack.enter_context(restored_process())
        shown_warnings = stack.enter_context(recorded_warnings())
        accelerator, shard = make_accelerator(settings)
        settings = record_precision(settings, accelerator)
        stack.enter_context(friendly_errors(settings, accelerator.num_processes))
        repo = run_on_main(accelerator, lambda: check_access(settings))
        run_on_main(accelerator, lambda: stack.enter_context(lock_run_folder(settings.output_dir)))
        live = LiveReport(settings, accelerator.is_main_process, shown_warnings)
        train_and_export(settings, accelerator, shard, repo, live)


def train_and_export(
    settings: Config,
    accelerator: Accelerator,
    shard: ShardFunction | None,
    repo: str | None,
    live: LiveReport,
) -> None:
    for preset, values in settings.applied_presets.items():
        accelerator.print(preset, "is", *(f"{path}={value}" for path, value in values.items()))
    try_optimizer(settings.optimizer)
    processes = ProcessGroup(accelerator)
    task, batches, inputs = build_task(settings, accelerator, shard)
    facts = resume_facts(settings, accelerator, inputs)
    state = resume_together(settings, task, processes, facts)
    if accelerator.is_main_process:
        write_atomic(settings.output_dir / CONFIG_NAME, loading.dump_config(settings))
    with warn_on_error("the tracker"):
        accelerator.init_trackers(settings.tracking.project_name, init_kwargs=TRACKER_OPTIONS)
    if settings.train.auto_micro_batch:
        find_executable_batch_size(task, batches, settings, processes, state.step)
    push = PushToHub(task, settings, repo)
    banner = start_banner(settings, task, batches, accelerator, state.step)
    # where stdout is a file, it would come after the progress, which is on stderr
    accelerator.print(banner, flush=True)
    with live.followed(state.step):
        steps = Training(task, batches, settings, processes, push, live).to_end(state)
        if accelerator.is_main_process or task.needs_all_processes:
            task.finish(steps)
    if accelerator.is_main_process:
        if repo:
            write_report(settings.output_dir, pictures=False, config=settings)
        accelerator.print(end_banner(settings, steps), flush=True)
    accelerator.wait_for_everyone()
    with warn_on_error("the tracker"):
        accelerator.end_training()
    push.finish()


def build_task(
    settings: Config, accelerator: Accelerator, shard: ShardFunction | None
) -> tuple[Task, Batches, Facts]:
    """The task, its batches and the facts of its pictures and base."""
    build = TASKS[settings.kind]
    return build(settings, accelerator, shard) if shard else build(settings, accelerator)


def resume_together(
    settings: Config, task: Task, processes: ProcessGroup, facts: Facts
) -> RunState:
    """The state of the newest checkpoint. Raises: UserError if processes find different ones."""
    state = resume(settings, task, processes.accelerator, facts)
    newest, minus_oldest = processes.all_max(state.step, -state.step)
    if newest != -minus_oldest:
        raise UserError(
            "output_dir: the processes find different checkpoints: "
            f"{settings.output_dir} must be on a shared disk"
        )
    return state


@dataclass(frozen=True)
class Training:
    """What is trained from step to step, whichever checkpoint it starts from."""

    task: Task
    batches: Batches
    settings: Config
    processes: ProcessGroup
    push: PushToHub
    live: LiveReport

    def to_end(self, state: RunState) -> int:
        """Train until the loop stops, going back to an earlier checkpoint when the run diverges.

        Returns the number of steps. Raises: Interrupted after a signal.
        """
        while not state.end:
            try:
                reason = self.train_from(state)
            except DivergenceError as error:
                state = self.roll_back(error, state)
                continue
            if reason.signal_number:
                raise Interrupted(reason.signal_number, stop_advice(self.settings))
            return reason.step
        return state.step

    def train_from(self, state: RunState) -> StopReason:
        """Train from a state until the loop stops. Raises: DivergenceError."""
        settings, task, accelerator = self.settings, self.task, self.processes.accelerator
        schedule = make_lr_schedule(settings.optimizer, settings.train.max_train_steps)

        def rate(step: int) -> float:
            return schedule(step) * 0.5**state.rollbacks

        kernel = attention_kernel(task.attention, accelerator.device)
        with kernel, training_backends(accelerator):
            samples = SamplePictures(task, settings, accelerator)
            if state.step == 0:
                samples.sample(0)
            self.live.start(state.step)
            log = LogMetrics(settings, accelerator, rate, state.step)
            validate = Validate(task, settings, self.processes, state.best)
            checkpoints = SaveCheckpoints(task, settings, self.processes, state)
            callbacks = [
                *task.callbacks,
                NonfiniteGuard(task, self.batches, settings, accelerator),
                validate,
                log,
                samples,
                self.live,
                checkpoints,
                self.push,
            ]
            loop = settings.train, settings.seed, accelerator, rate, callbacks, state.step
            with closing(log.progress):
                # a run may have been killed between the validation that ends it and its end
                reason = validate.stop_reason(state.step) or train(task, self.batches, *loop)
        if not reason.signal_number and reason.step < settings.train.max_train_steps:
            accelerator.print(f"the training is over after step {reason.step}: {reason.message}")
            reason = checkpoints.save_end(reason)
        return reason

    def roll_back(self, error: DivergenceError, state: RunState) -> RunState:
        """The state before the steps that failed, to go on from at half the learning rate."""
        settings, task, accelerator = self.settings, self.task, self.processes.accelerator
        advice = "Lower optimizer.learning_rate, or use mixed precision bf16 instead of fp16"
        if settings.train.on_divergence == "stop":
            raise RunFailedError(
                f"{error}. {advice}; the same command then needs another output_dir"
            ) from None
        earlier = resume(settings, task, accelerator, state.facts, before_step=error.first_step - 1)
        if earlier.step == 0:
            raise RunFailedError(
                f"{error}. There is no checkpoint from before that to go back to. {advice}"
            ) from None
        earlier = replace(earlier, rollbacks=state.rollbacks + 1)
        # a run that is killed now keeps the halved rate
        save_checkpoint(settings, task, accelerator, earlier)
        warnings.warn(
            f"{error}. Back to step {earlier.step}, at half the learning rate", stacklevel=2
        )
        return earlier
