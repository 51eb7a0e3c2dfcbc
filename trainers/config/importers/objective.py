"""What other trainers say of losses, noise and times, where it takes more than one key."""

from __future__ import annotations

from trainers.config.importers.base import ForeignConfig, number, positive

HUBER_LOSSES = ("huber", "smooth_l1")
HUBER_KEYS = ("huber_c", "huber_schedule")


def put_t_range(config: ForeignConfig, low: str, high: str, whole: float) -> None:
    """The part of the schedule that is trained, from two foreign keys.

    whole: what they call its end.
    """
    first, last = number(config.take(low)) or 0, number(config.take(high))
    last = whole if last is None else last
    if (first, last) != (0, whole):
        shares = [round(max(first, 0) / whole, 4), round(min(last, whole) / whole, 4)]
        config.put("objective.t_range", shares, f"{low}, {high}")


def put_loss(config: ForeignConfig) -> None:
    """sd-scripts' `loss_type`, and what goes with it; another one is left over."""
    loss = str(config.values.get("loss_type") or "l2")
    if loss in ("l2", *HUBER_LOSSES):
        config.ignore(["loss_type", *HUBER_KEYS])
    if loss in HUBER_LOSSES:
        config.put("objective.loss", loss, "loss_type")
        config.put("objective.huber_c", number(config.take("huber_c")), "huber_c")
        config.put("objective.huber_schedule", config.take("huber_schedule"), "huber_schedule")


def put_coarse_noise(config: ForeignConfig) -> None:
    """sd-scripts' multi-resolution noise."""
    levels = positive(config.take("multires_noise_iterations"))
    note = "Each is half of the last; theirs are two to four times smaller, by chance"
    config.put("objective.multires_noise_levels", levels, "multires_noise_iterations", note)
    discount = number(config.take("multires_noise_discount"))
    if levels:
        config.put("objective.multires_noise_discount", discount, "multires_noise_discount")
