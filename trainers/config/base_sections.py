"""The sections that every trainer's config has: each key with its default, help and limits."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainers.config.bounds import Fraction, LearningRate, Name, Steps


class Section(BaseModel):
    """A part of a config: an unknown key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as a number: Python would count them as 1 and 0."""
        values = value if isinstance(value, (list, tuple)) else [value]
        types = leaf_types(cls.model_fields[info.field_name].annotation)
        takes_numbers_only = {int, float} & types and bool not in types
        if takes_numbers_only and any(isinstance(part, bool) for part in values):
            raise ValueError("input should be a number")
        return value


def leaf_types(annotation: Any) -> set[type]:
    """The types that an annotation is made of, and those of the values of a Literal."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*(leaf_types(argument) for argument in arguments))


def field(default: Any, help: str, **limits: Any) -> Any:
    """A key with its default and its help; limits: pydantic's, such as ge=0."""
    return Field(default, description=help, **limits)


ADAM_KEYS = ("betas", "eps", "weight_decay")
# The settings that each optimizer takes beside its rate.
OPTIMIZER_KEYS = {
    "adamw": ADAM_KEYS,
    "adamw_8bit": ADAM_KEYS,
    "paged_adamw_8bit": ADAM_KEYS,
    "adafactor": ("weight_decay",),
    "prodigy": ADAM_KEYS,
    "lion": ("betas", "weight_decay"),
    "came": ("weight_decay",),
    "muon": ("weight_decay",),
    "schedule_free": ADAM_KEYS,
    "prodigy_schedule_free": ADAM_KEYS,
}
# Prodigy finds the rate itself and multiplies it with this.
PRODIGY_RATE = 1.0
FINDS_RATE = ("prodigy", "prodigy_schedule_free")
# They keep an average of the weights, which takes the place of a schedule.
SCHEDULE_FREE = ("schedule_free", "prodigy_schedule_free")
# What an optimizer has where the config says nothing, if that is not the section's own default.
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "prodigy": {"learning_rate": PRODIGY_RATE},
    "lion": {"betas": (0.9, 0.99)},
    "prodigy_schedule_free": {"learning_rate": PRODIGY_RATE, "betas": (0.9, 0.99)},
}
# package.Class, of any installed package
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", max_length=200)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]


def check_argument(value: Any) -> Any:
    """One message instead of one for each type that it could be. Raises: ValueError."""
    if not isinstance(value, (bool, int, float, str, list, NoneType)):
        raise ValueError("must be a number, a text, true, false, null or a list of numbers")
    return value


ListOfNumbers = Annotated[list[Number], Field(max_length=10)]
Argument = Annotated[bool | Number | Name | ListOfNumbers | None, BeforeValidator(check_argument)]
Arguments = Annotated[dict[Name, Argument], Field(max_length=50)]


class OptimizerConfig(Section):
    """The optimizer, its learning rate, and how the rate changes over the steps."""

    name: Literal[tuple(OPTIMIZER_KEYS)] | ClassName = field(
        "adamw",
        "Optimizer, or package.Class of an installed package. Those after prodigy have no "
        "measurement here.",
    )
    arguments: Arguments = field({}, "More arguments of the optimizer, by its own names.")
    learning_rate: LearningRate = field(
        1e-4, f"Peak learning rate ({PRODIGY_RATE} for {' and '.join(FINDS_RATE)})."
    )
    text_encoder_lr: LearningRate | None = field(
        None, "Learning rate of the text encoder; null means learning_rate."
    )
    lora_plus_ratio: float | None = field(
        None,
        "LoRA+ (Hayou et al. 2024): the learning rate of lora_B is this many times that of lora_A; "
        "the paper has 16 for language models, here it has no measurement. null: one rate.",
        ge=1,
        le=1000,
    )
    betas: tuple[Fraction, Fraction] = field((0.9, 0.999), "Adam's running averages.")
    weight_decay: float = field(1e-2, "Decoupled weight decay.", ge=0, le=10)
    # float32 rounds what is much smaller to zero
    eps: float = field(1e-8, "Adam's epsilon.", ge=1e-30, le=1)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = field("constant", "Learning rate over the steps.")
    lr_warmup_steps: int = field(0, "Steps of linear warm-up.", ge=0, le=10_000_000)
    lr_num_cycles: int = field(1, "Restarts of cosine_with_restarts.", ge=1, le=10_000)
    lr_power: float = field(1.0, "Power of polynomial.", gt=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def apply_defaults(cls, tree: Any) -> Any:
        """The optimizer's own defaults, where the config names none."""
        if isinstance(tree, dict):
            return OPTIMIZER_DEFAULTS.get(str(tree.get("name")), {}) | tree
        return tree


class EarlyStopConfig(Section):
    """When a run ends before its last step: once its metric no longer improves."""

    metric: Name | None = field(
        None,
        "What has to improve, as metrics.jsonl calls it, such as held_out_loss; null: the first "
        "that this kind of run measures.",
    )
    patience: int = field(
        5, "Validations without an improvement after which the run ends.", ge=1, le=1_000_000
    )
    min_delta: float = field(
        0.0, "An improvement is more than this better than the best before.", ge=0, le=1e6
    )


# sections within a section, by their paths
NESTED_SECTIONS: dict[str, type[Section]] = {"train.early_stop": EarlyStopConfig}

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
PRECISION_HELP = (
    "What is computed in half precision: bf16, fp16 or no; auto: bf16 where the accelerator has "
    "it, fp16 on older ones, no on a CPU. The launcher's --mixed_precision wins."
)


class TrainConfig(Section):
    """How long is trained, on how many pictures at a time, and in what precision."""

    max_train_steps: Steps = field(800, "Optimizer steps.")
    train_batch_size: int = field(
        1,
        "Pictures per process and micro-batch (as many class pictures are added).",
        ge=1,
        le=65_536,
    )
    gradient_accumulation_steps: int = field(
        1, "Micro-batches per optimizer step.", ge=1, le=65_536
    )
    mixed_precision: MixedPrecision = field(
        "no", f"{PRECISION_HELP} The small networks have no measurement of it on a GPU yet."
    )
    max_grad_norm: float = field(1.0, "Gradients are clipped to this norm.", gt=0, le=1e6)
    max_skipped_steps: int = field(
        5,
        "Steps without a finite gradient are skipped; this many in a row end the run.",
        ge=1,
        le=10_000,
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
    early_stop: EarlyStopConfig | None = field(
        None, "End the run once a metric on held-out pictures no longer improves; null: never."
    )


class CheckpointConfig(Section):
    """How often the state is saved that a run which was stopped goes on from."""

    checkpointing_steps: Steps = field(
        500, "Steps between checkpoints; the last step is always saved."
    )
    every_minutes: float | None = field(
        None, "Minutes between checkpoints, in addition to checkpointing_steps.", gt=0, le=100_000
    )
    checkpoints_total_limit: int = field(2, "Older checkpoints are removed.", ge=1, le=100_000)
    keep_loras: int | None = field(
        10,
        "The LoRA files of so many newest checkpoints stay when their states are removed; null "
        "keeps all.",
        ge=0,
        le=1_000_000,
    )
    keep_best: bool | None = field(
        None,
        "Keep the weights of the best validation in OUTPUT_DIR/best; null: where pictures are held "
        "out, but not the whole pipeline of lora: null.",
    )
    resume_from_checkpoint: Name | None = field(
        "latest", "latest, the path of a checkpoint, or null to start from step 0."
    )
    extend: bool = field(
        False,
        "Go on where train.max_train_steps has grown, with the learning rates of the new length, "
        "or where the training was over early.",
    )


class ValidationConfig(Section):
    """How often the model is sampled and measured while it trains."""

    validation_steps: Steps = field(
        100,
        "Steps between validations, which sample and measure; the finished run is always sampled.",
    )
    held_out_pictures: int | None = field(
        None,
        "Held-out pictures that a validation measures, always the same; null: one for ten that "
        "are trained on between two validations, from 4 to 500. The end of a run measures all.",
        ge=1,
        le=1_000_000,
    )


class TrackingConfig(Section):
    """Where loss, learning rate, speed and memory are reported."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        ["tensorboard"], "Trackers; metrics.jsonl is always written.", max_length=3
    )
    project_name: Name = field("diffusion-trainers", "Project in the tracker.")
    log_every: Steps = field(10, "Steps between log lines.")


class HubConfig(Section):
    """Whether, when and where the result is uploaded to the Hugging Face Hub."""

    push_to_hub: bool = field(False, "Upload the result when the run ends.")
    hub_model_id: Name | None = field(
        None, "USER/NAME of the repository; null means the output folder's name."
    )
    private: bool = field(False, "Create the repository as private.")
    weights: Literal["last", "best"] = field(
        "last", "Which weights are uploaded at the end: of the last step, or of OUTPUT_DIR/best."
    )
    hub_revision: Name | None = field(
        None, "Branch to push to, created if it does not exist; null means main."
    )
    create_pr: bool = field(False, "Open a pull request instead of pushing to the branch.")
    push_every: Steps | None = field(None, "Steps between uploads of the weights during training.")
    required: bool = field(
        False, "A failed upload makes the exit status 1; otherwise it is only reported."
    )
