"""The report of a run while it trains, which is written anew now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from trainers.config import Config
from trainers.errors import Interrupted, UserError, warn_on_error
from trainers.publishing.report import write_report
from trainers.training.loop import StepMetrics
from trainers.training.status import (
    FAILED,
    FINISHED,
    MAX_TEXT,
    RUNNING,
    STOPPED,
    new_status,
    write_status,
)

# at least this many seconds between two pages
PAGE_SECONDS = 10.0
# and so many times what a page costs, which keeps the pages below a hundredth of the run's time
COST_FACTOR = 100.0


class LiveReport:
    """Writes the state of the run and its page, in the main process."""

    def __init__(self, config: Config, is_main: bool, warnings: deque[str]) -> None:
        """warnings: the newest ones, see `training.status.recorded_warnings`."""
        self.config, self.is_main, self.warnings = config, is_main, warnings
        self.start_step = self.step = 0
        self.started_at = time.monotonic()
        self.next_page_at = 0.0
        self.page_seconds = 0.0

    def start(self, step: int) -> None:
        """Tell that the training goes on from a step."""
        self.start_step = self.step = step
        self.started_at = time.monotonic()
        self.write(RUNNING)

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        self.step = step
        every = self.config.tracking.log_every, self.config.validation.validation_steps
        if all(step % interval for interval in every) or time.monotonic() < self.next_page_at:
            return
        self.write(RUNNING)

    @contextmanager
    def followed(self, step: int) -> Iterator[None]:
        """Tell how what is done inside, from a step on, ends."""
        self.step = step
        try:
            yield
        except Interrupted as stop:
            self.write(STOPPED, str(stop))
            raise
        except BaseException as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.write(FAILED, f"{kind}{error}")
            raise
        self.write(FINISHED)

    def write(self, state: str, message: str = "") -> None:
        if not self.is_main:
            return
        begin, folder = time.monotonic(), self.config.output_dir
        status = new_status(state, self.step, self.config.train.max_train_steps)
        done = self.step - self.start_step
        left = None
        if state == RUNNING and done:
            left = (begin - self.started_at) / done * (status.last_step - self.step)
        details = {"message": message[:MAX_TEXT], "warnings": list(self.warnings)}
        # a finished run has its report; before that nothing depends on it
        with nullcontext() if state == FINISHED else warn_on_error("the live report"):
            write_status(folder, replace(status, seconds_left=left, **details))
            write_report(folder, config=self.config)
        end = time.monotonic()
        self.page_seconds += end - begin
        self.next_page_at = end + max(PAGE_SECONDS, COST_FACTOR * (end - begin))
