"""What is measured on held-out pictures while a run trains, and what follows: the best weights are
kept, and a run that no longer improves ends."""

from __future__ import annotations

import time

import torch

from trainers.config import Config
from trainers.config.validation_metrics import chosen_metric, keeps_best
from trainers.distributed.collectives import ProcessGroup
from trainers.errors import warn_on_error
from trainers.run_folder import BEST, VALIDATION_SECONDS
from trainers.training.best_weights import BestSoFar, result_weights, write_best
from trainers.training.loop import StepMetrics, StopReason, Task, averaged_weights


class Validate:
    """Measures every `validation_steps`, with the averaged weights where there are any.

    The main process's figures decide in all processes, for theirs may be rounded otherwise.
    """

    def __init__(
        self, task: Task, config: Config, processes: ProcessGroup, best: BestSoFar
    ) -> None:
        """best: of the checkpoint to go on from; it is brought up to date in place."""
        self.task, self.config, self.processes, self.best = task, config, processes, best
        self.metric, self.keeps_best = chosen_metric(config), keeps_best(config)

    def __call__(self, step: int, metrics: StepMetrics) -> StopReason | None:
        if step % self.config.validation.validation_steps or self.metric is None:
            return None
        begin, device = time.perf_counter(), self.processes.accelerator.device
        with averaged_weights(self.task):
            values = self.task.validate()
        values = self.processes.from_main(values)
        self.judge(step, values.get(self.metric, float("nan")))
        values[VALIDATION_SECONDS] = time.perf_counter() - begin
        for name, value in values.items():
            metrics[name] = torch.tensor(value, dtype=torch.float32, device=device)
        return self.stop_reason(step)

    def judge(self, step: int, value: float) -> None:
        """Note the value of a step, and keep the weights if they are the best so far."""
        stop = self.config.train.early_stop
        min_delta = stop.min_delta if stop else 0.0
        is_best = self.best.record(step, value, self.metric, min_delta)
        if not (is_best and self.keeps_best):
            return
        accelerator, run = self.processes.accelerator, self.config.output_dir
        with result_weights(self.task, accelerator):
            if accelerator.is_main_process:
                with warn_on_error(f"writing {run / BEST}"):
                    write_best(run, self.task.save, step, self.metric, value)

    def stop_reason(self, step: int) -> StopReason | None:
        """Why a run that came to a step is over, if it is; also one that was killed just then."""
        stop, best = self.config.train.early_stop, self.best
        if stop is None or best.waited < stop.patience:
            return None
        found = "has never been a number"
        if best.value is not None:
            found = f"was best at step {best.step}, {best.value:.4g}"
        message = f"{self.metric} {found}: no improvement in {best.waited} validations"
        return StopReason(message, step)
