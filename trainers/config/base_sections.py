"""The sections that every trainer's config has: each key with its default, help and limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a config: an unknown key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def field(default: Any, help: str, **limits: Any) -> Any:
    """A key with its default and its help; limits: pydantic's, such as ge=0."""
    return Field(default, description=help, **limits)


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "prodigy"] = field(
        "adamw", "Optimizer."
    )
    learning_rate: float = field(1e-4, "Peak learning rate (1.0 for prodigy).", ge=0)
    text_encoder_lr: float | None = field(
        None, "Learning rate of the text encoder; null means learning_rate.", ge=0
    )
    betas: tuple[Fraction, Fraction] = field((0.9, 0.999), "Adam's running averages.")
    weight_decay: float = field(1e-2, "Decoupled weight decay.", ge=0)
    eps: PositiveFloat = field(1e-8, "Adam's epsilon.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = field("constant", "Learning rate over the steps.")
    lr_warmup_steps: NonNegativeInt = field(0, "Steps of linear warm-up.")
    lr_num_cycles: PositiveInt = field(1, "Restarts of cosine_with_restarts.")
    lr_power: PositiveFloat = field(1.0, "Power of polynomial.")


class TrainConfig(Section):
    max_train_steps: PositiveInt = field(800, "Optimizer steps.")
    train_batch_size: PositiveInt = field(
        1, "Pictures per process and micro-batch (as many class pictures are added)."
    )
    gradient_accumulation_steps: PositiveInt = field(1, "Micro-batches per optimizer step.")
    max_grad_norm: PositiveFloat = field(1.0, "Gradients are clipped to this norm.")
    max_skipped_steps: PositiveInt = field(
        5, "Steps without a finite gradient are skipped; this many in a row end the run."
    )
    on_divergence: Literal["rollback", "stop"] = field(
        "rollback",
        "How it ends: back to the last good checkpoint at half the learning rate, or with a "
        "message.",
    )
    auto_micro_batch: bool = field(
        False,
        "Find first how often train_batch_size must be halved, and accumulation doubled, to fit "
        "in memory.",
    )
    ema_decay: float | None = field(
        None, "Keep a running average of the trained weights, and use it.", gt=0, lt=1
    )


class CheckpointConfig(Section):
    checkpointing_steps: PositiveInt = field(
        500, "Steps between checkpoints; the last step is always saved."
    )
    every_minutes: PositiveFloat | None = field(
        None, "Minutes between checkpoints, in addition to checkpointing_steps."
    )
    checkpoints_total_limit: PositiveInt = field(2, "Older checkpoints are removed.")
    resume_from_checkpoint: str | None = field(
        "latest", "latest, the path of a checkpoint, or null to start from step 0."
    )


class ValidationConfig(Section):
    validation_steps: PositiveInt = field(
        100, "Steps between samples; the finished run is always sampled."
    )


class TrackingConfig(Section):
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        ["tensorboard"], "Trackers; metrics.jsonl is always written."
    )
    project_name: str = field("diffusion-trainers", "Project in the tracker.")
    log_every: PositiveInt = field(10, "Steps between log lines.")


class HubConfig(Section):
    push_to_hub: bool = field(False, "Upload the result when the run ends.")
    hub_model_id: str | None = field(
        None, "USER/NAME of the repository; null means the output folder's name."
    )
    private: bool = field(False, "Create the repository as private.")
    hub_revision: str | None = field(
        None, "Branch to push to, created if it does not exist; null means main."
    )
    create_pr: bool = field(False, "Open a pull request instead of pushing to the branch.")
    push_every: PositiveInt | None = field(
        None, "Steps between uploads of the weights during training."
    )
    required: bool = field(
        False, "A failed upload makes the exit status 1; otherwise it is only reported."
    )
