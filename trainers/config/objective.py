"""The objective of a diffusion model: its section of the config, and the rules between its keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.config.base import Config
from trainers.config.base_rules import Errors, SpecialKeys, irrelevant_keys
from trainers.config.base_sections import Section, field
from trainers.config.bounds import Probability
from trainers.config.family_facts import family_field

Shift = Annotated[float, Field(gt=0, le=100)]
MIN_RANGE = 1e-3  # a time of a thousand


class ObjectiveConfig(Section):
    """Which times of the noise schedule are trained, and how the loss weighs them."""

    stratified: bool = field(
        True, "Spread the times of each global batch evenly over the schedule."
    )
    t_range: tuple[Probability, Probability] = field(
        (0.0, 1.0),
        "Train only the times between these shares of the schedule; 0 is the picture, 1 noise.",
    )
    loss: Literal["l2", "huber", "smooth_l1"] = field(
        "l2",
        "huber and smooth_l1 count large errors less (Khrapov et al. 2024). Not measured.",
    )
    huber_c: float = field(
        0.1, "Of huber and smooth_l1: the error above which it counts less.", gt=0, le=1
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = field(
        "snr", "How huber_c is reached from 1, which it is where there is no noise."
    )
    input_perturbation: float = field(
        0.0,
        "Adds so much noise to the noisy latents alone (Ning et al. 2023); 0.1 is usual. Not "
        "measured.",
        ge=0,
        le=10,
    )
    snr_gamma: float | None = family_field(
        "objective",
        "snr_gamma",
        None,
        "min-SNR weighting (Hang et al. 2023); 5 is usual.",
        gt=0,
        le=10_000,
    )
    debiased: bool = family_field(
        "objective", "debiased", False, "weight by 1 / sqrt(SNR) (Yu et al. 2023)."
    )
    noise_offset: float = family_field(
        "objective",
        "noise_offset",
        0.0,
        "adds a constant per channel to the noise: darker, lighter pictures.",
        ge=0,
        le=10,
    )
    multires_noise_levels: int = family_field(
        "objective",
        "multires_noise_levels",
        0,
        "adds noise of so many coarser sizes, each half of the last; 6 is usual. Not measured.",
        ge=0,
        le=16,
    )
    multires_noise_discount: float = family_field(
        "objective",
        "multires_noise_discount",
        0.3,
        "weight of each coarser size, relative to the last.",
        gt=0,
        le=1,
    )
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = family_field(
        "objective",
        "density",
        "logit_normal",
        "how often each time is trained (Esser et al. 2024).",
    )
    logit_mean: float = field(
        0.0,
        "Of logit_normal; t = 1 is noise: a value from the diffusers scripts changes sign.",
        ge=-20,
        le=20,
    )
    logit_std: float = field(1.0, "Of logit_normal.", gt=0, le=20)
    # outside of them the density is not one: times would run backwards (Esser et al. 2024, 3.1)
    mode_scale: float = field(1.29, "Of mode.", ge=-1, le=1.75)
    shift: Literal["auto", "none"] | Shift = family_field(
        "objective",
        "shift",
        "auto",
        "towards noise, for large pictures; auto does as the model's own scheduler.",
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = family_field(
        "objective", "weighting", "none", "weight of the loss at each time."
    )
    precondition: bool = family_field(
        "objective", "precondition", False, "the loss of x0 instead of v."
    )


def objective_errors(config: Config) -> Errors:
    """A range that holds no time, two weights, and settings of what is not chosen."""
    objective = config.objective
    low, high = objective.t_range
    if high - low < MIN_RANGE:
        message = f"from {low} to {high} there is no time to train: write the lower end first"
        yield "objective.t_range", message
    if objective.debiased and objective.snr_gamma:
        message = (
            "cannot be combined with objective.snr_gamma, which weights the loss too: remove one "
            "of them"
        )
        yield "objective.debiased", message
    keys = SpecialKeys(("huber", "smooth_l1"), "objective", ("huber_c", "huber_schedule"))
    yield from irrelevant_keys(config, objective.loss, [keys])
    discount = ObjectiveConfig.model_fields["multires_noise_discount"].default
    if objective.multires_noise_discount != discount and not objective.multires_noise_levels:
        message = "has no effect without objective.multires_noise_levels: set that, or remove this"
        yield "objective.multires_noise_discount", message
