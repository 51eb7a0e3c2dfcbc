"""Which weights a command line or a config names: RUN, RUN@STEP, RUN@best, or a file from
anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trainers.config import Config
from trainers.errors import UserError
from trainers.run_folder import (
    BEST,
    BEST_NAME,
    CHECKPOINTS,
    CONFIG_NAME,
    WEIGHT_NAME,
    check_finished,
    lora_folders,
    parse_step,
    read_best,
    read_run_config,
)
from trainers.training.manifest import complete_checkpoints, read_manifest

AT_STEP = re.compile(rf"(.+?)/?@([0-9]{{1,9}}|{BEST})")
MAX_NAMED = 12  # steps in a message


@dataclass(frozen=True)
class RunWeights:
    """What of a run is meant.

    step: of the checkpoint whose LoRA it is, or of the best validation; None: the finished run.
    note: what is to be told of the choice, a line.
    """

    run: Path
    config: Config
    step: int | None = None
    note: str = ""
    is_best: bool = False

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        if self.is_best:
            return self.run / BEST
        if self.step is None:
            return self.run
        return lora_folders(self.run / CHECKPOINTS)[self.step]

    @property
    def name(self) -> str:
        """RUN, RUN@STEP or RUN@best, as it may be given again."""
        if self.is_best:
            return f"{self.run}@{BEST}"
        return str(self.run) if self.step is None else f"{self.run}@{self.step}"


def split_step(argument: str | Path) -> tuple[Path, int | str | None]:
    """The run and the step in RUN@STEP, or in RUN/checkpoints/step-STEP; "best" in RUN@best, or in
    RUN/best.

    Without a step the path is what was given: a file or folder of that very name comes first.
    """
    path = Path(argument)
    match = AT_STEP.fullmatch(str(argument))
    if match and not path.exists():
        return Path(match[1]), match[2] if match[2] == BEST else int(match[2])
    step = parse_step(path.name)
    if step is not None and path.parent.name == CHECKPOINTS:
        return path.parent.parent, step
    if path.name == BEST and read_best(path):
        return path.parent, BEST
    return path, None


def is_run(argument: str | Path) -> bool:
    """Whether RUN, RUN@STEP or RUN@best is of the folder of a run."""
    return (split_step(argument)[0] / CONFIG_NAME).is_file()


def find_run_weights(argument: str | Path, kind: str = "") -> RunWeights:
    """The weights that RUN, RUN@STEP or RUN@best names.

    A run that was stopped is its newest checkpoint with a LoRA. Raises: UserError when the folder
    is no run of that kind, if one is given, or has no such weights.
    """
    run, step = split_step(argument)
    config = read_run_config(run)
    if kind and config.kind != kind:
        raise UserError(f"{run} is a run of {config.kind}, not of {kind}")
    if step == BEST:
        return find_best(run, config)
    steps = list(lora_folders(run / CHECKPOINTS)) if config.writes_lora else []
    if step is not None:
        check_step(run, step, steps, config)
        return RunWeights(run, config, step)
    if not steps or is_finished(run, config):
        check_finished(run, config)
        return RunWeights(run, config)
    newest = steps[-1]
    note = f"{run} is not finished: this is the LoRA of its newest checkpoint, {run}@{newest}"
    return RunWeights(run, config, newest, note)


def find_best(run: Path, config: Config) -> RunWeights:
    """The weights in RUN/best. Raises: UserError where there are none."""
    record = read_best(run / BEST)
    if not record:
        raise UserError(
            f"{run} has no {BEST}/{BEST_NAME}: a run keeps its best weights where pictures are "
            "held out (checkpoint.keep_best), or scripts/evaluate.py --checkpoints finds them"
        )
    note = f"{run / BEST}: {record['metric']} {record['value']:.4g} at step {record['step']}"
    return RunWeights(run, config, record["step"], note, is_best=True)


def check_step(run: Path, step: int, steps: list[int], config: Config) -> None:
    """Raises: UserError where there is no LoRA of that step."""
    if step in steps:
        return
    if not config.writes_lora:
        raise UserError(f"{run}@{step}: only the checkpoints of a LoRA run have weights of a step")
    kept = ", ".join(map(str, steps[-MAX_NAMED:])) or "none"
    raise UserError(
        f"{run} has no LoRA of step {step}. There are those of these steps: {kept} "
        "(checkpoint.checkpointing_steps and checkpoint.keep_loras decide)"
    )


def is_finished(run: Path, config: Config) -> bool:
    """Whether the LoRA of a run folder is that of its last step.

    A run that is trained longer has one of its shorter self until it is finished again.
    """
    final = run / WEIGHT_NAME
    if not final.is_file():
        return False
    for checkpoint in complete_checkpoints(run / CHECKPOINTS):
        manifest = read_manifest(checkpoint)
        is_over = manifest.get("end") or manifest["step"] >= config.train.max_train_steps
        lora = checkpoint / WEIGHT_NAME
        # a checkpoint that could not be written at the end leaves an older one as the newest
        return bool(is_over) or not lora.is_file() or not is_newer(lora, final)
    return True


def is_newer(file: Path, other: Path) -> bool:
    return file.stat().st_mtime_ns > other.stat().st_mtime_ns
