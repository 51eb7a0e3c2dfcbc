"""What a run measures at each validation, which way it improves, and what it needs for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from trainers.config.base_rules import Errors

if TYPE_CHECKING:
    from trainers.config.base import Config

LOWER, HIGHER = "lower", "higher"
HELD_OUT_LOSS = "held_out_loss"
# the times of the noise schedule, in thirds from the least noise to the most
TIME_BANDS = ("low", "middle", "high")
# of what the LoRA draws, see `lora.likeness`; all but one compare it with the base
OF_LORA = ("subject_less_drift", "prior_drift", "class_bleed")
LIKENESS = (OF_LORA[0], "subject", *OF_LORA[1:])
# of the validation section: on which the pictures depend that are drawn for these
DRAWING_KEYS = (
    "likeness_pictures",
    "likeness_network",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
)
HELD_OUT_AUROC = "held_out_auroc"
SCORING_KEYS = ("scorer", "bank_size")  # of the validation section: how that one is scored
HELD_OUT_LOSSES = (HELD_OUT_LOSS, *(f"{HELD_OUT_LOSS}_{band}" for band in TIME_BANDS))

# by name in metrics.jsonl: which values are better
DIRECTIONS: Mapping[str, Literal["lower", "higher"]] = {
    **dict.fromkeys(HELD_OUT_LOSSES, LOWER),
    "subject_less_drift": HIGHER,
    "subject": HIGHER,
    "prior_drift": LOWER,
    "class_bleed": LOWER,
    "held_out_psnr": HIGHER,
    "held_out_ssim": HIGHER,
    HELD_OUT_AUROC: HIGHER,
    "held_out_kid": LOWER,
    "held_out_precision": HIGHER,
    "held_out_recall": HIGHER,
    "held_out_dice": HIGHER,
    "held_out_iou": HIGHER,
    "held_out_pixel_error": LOWER,
}


def available_metrics(config: Config) -> Iterator[str]:
    """Those that a validation of this run gives, the one that a run is judged by first."""
    for name, requirement in config.validation_metrics.items():
        if not requirement:
            yield name


def chosen_metric(config: Config) -> str | None:
    """By which the best weights are chosen and a run ends; None where nothing is measured."""
    stop = config.train.early_stop
    if stop is not None and stop.metric is not None:
        return stop.metric
    return next(available_metrics(config), None)


def drawing_keys(config: Config) -> tuple[str, ...]:
    """Keys of the validation section on which that metric depends, beside held-out pictures."""
    metric = chosen_metric(config)
    if metric == HELD_OUT_AUROC:
        return SCORING_KEYS
    return DRAWING_KEYS if metric in LIKENESS else ()


def keeps_best(config: Config) -> bool:
    """Whether the weights of the best validation are kept."""
    if chosen_metric(config) is None:
        return False
    if config.checkpoint.keep_best is None:
        return config.result_is_small
    return config.checkpoint.keep_best


def held_out_count(config: Config, global_batch: int) -> int:
    """How many held-out pictures a validation measures.

    A forward pass is about a third of a training step: one picture for ten takes about 3 %.
    """
    if config.validation.held_out_pictures is not None:
        return config.validation.held_out_pictures
    trained = config.validation.validation_steps * global_batch
    return min(max(trained // 10, 4), 500)


def too_late(config: Config) -> str:
    """Why a run is over before it could end early; empty where it is not."""
    patience, steps = config.train.early_stop.patience, config.train.max_train_steps
    pace = config.validation.validation_steps
    if patience * pace < steps:
        return ""
    return (
        f"{patience} validations, one every {pace} steps, take all of the {steps} steps, so the "
        "run could not end early: lower this or validation.validation_steps, or remove "
        "train.early_stop"
    )


def validation_errors(config: Config) -> Errors:
    """A metric to stop by that is not measured, and weights to keep or push that there are not."""
    stop, known = config.train.early_stop, config.validation_metrics
    available = list(available_metrics(config))
    needed = next(iter(known.values()), "")
    if stop is not None and stop.metric is not None and stop.metric not in known:
        close = get_close_matches(stop.metric, known, 1, 0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(known)
        yield "train.early_stop.metric", f"{stop.metric!r} is not one of {names}{hint}"
    elif stop is not None and stop.metric is not None and known[stop.metric]:
        yield "train.early_stop.metric", f"{stop.metric} needs {known[stop.metric]}"
    elif stop is not None and not available:
        yield "train.early_stop", f"nothing is measured that could stop the run: it needs {needed}"
    elif stop is not None and (problem := too_late(config)):
        yield "train.early_stop.patience", problem
    if available:
        if config.hub.weights == "best" and not keeps_best(config):
            yield "hub.weights", "no best weights are kept: set checkpoint.keep_best: true"
        return
    if config.checkpoint.keep_best:
        message = f"nothing is measured that could tell which is the best: it needs {needed}"
        yield "checkpoint.keep_best", message
    if config.hub.weights == "best":
        yield "hub.weights", f"there is no best without a measurement: it needs {needed}"
