"""Where a run is, beside its tensors, and how that is read from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accelerate import Accelerator

from trainers.config import Config
from trainers.training.best_weights import BestSoFar
from trainers.training.facts import Facts, find_extension, is_judged_alike
from trainers.training.manifest import Manifest


@dataclass
class RunState:
    """Where a run is, beside its tensors.

    facts: from `resume_facts`; rollbacks: each has halved the learning rate; end: why the training
    was over before the last step, if it was; extensions: from `find_extension`, oldest first; best:
    the validations so far, which `Validate` brings up to date.
    """

    facts: Facts
    step: int = 0
    rollbacks: int = 0
    end: str = ""
    extensions: Sequence[Facts] = ()
    best: BestSoFar = field(default_factory=BestSoFar)


def is_over(state: RunState, config: Config) -> bool:
    """Whether there is nothing left to train."""
    return bool(state.end) or state.step >= config.train.max_train_steps


def state_of(
    manifest: Manifest, facts: Facts, config: Config, accelerator: Accelerator
) -> RunState:
    """The state in a manifest, open again where the run is to be trained longer."""
    step, end = manifest["step"], manifest.get("end", "")
    extensions, best = manifest.get("extensions", []), BestSoFar(**manifest.get("best", {}))
    if best.value is not None and not is_judged_alike(manifest["facts"], facts):
        accelerator.print(
            "what is measured at a validation has changed, so what comes cannot be compared with "
            f"the best so far, {best.value:.4g} at step {best.step}: the best is chosen anew"
        )
        best = BestSoFar()
    if extension := find_extension(manifest, config):
        # what has ended the run must not end it again at once
        extensions, end, best = [*extensions, extension], "", replace(best, waited=0)
        accelerator.print(
            f"trained longer from step {step} on, with the learning rates of a run of "
            f"{config.train.max_train_steps} steps"
        )
    elif end:
        accelerator.print(
            f"the training was over after step {step}: {end}. checkpoint.extend=true goes on to "
            "train.max_train_steps, once for each number of steps"
        )
    return RunState(facts, step, manifest.get("rollbacks", 0), end, extensions, best)
