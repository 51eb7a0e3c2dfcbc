"""The sections of a DreamBooth config: every key with its default, help and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainers.config.base_sections import Section, TrainConfig, ValidationConfig, field
from trainers.config.family_facts import default_family, families_with, family_facts, family_names

FamilyName = Literal[family_names()]


def family_field(section: str, key: str, default: Any, help: str, **limits: Any) -> Any:
    """A key that only some families understand; the help names them."""
    titles = ", ".join(family_facts(name).title for name in families_with(section, key))
    return field(default, f"{titles}: {help}", **limits)


def t5_tokens() -> str:
    """How many tokens each family's T5 reads."""
    parts = []
    for name in family_names():
        facts = family_facts(name)
        parts += [f"{facts.title}: {e.tokens}" for e in facts.text_encoders.values() if e.tokens]
    return ", ".join(parts)


class ModelConfig(Section):
    family: FamilyName = field(default_family(), "Which architecture the base model has.")
    pretrained_model_name_or_path: str = field(
        family_facts(default_family()).default_base,
        "Hub repository or local folder in the diffusers layout.",
    )
    revision: str | None = field(None, "Branch, tag or commit of the Hub repository.")
    variant: str | None = field(None, "Weight file variant, such as fp16.")
    quantization: Literal["none", "nf4", "int8", "fp8"] = field(
        "none", "Keep the frozen base in 8 or 4 bits; LoRA on top stays float32 (QLoRA)."
    )
    modulation_cache: bool = family_field(
        "model",
        "modulation_cache",
        False,
        "keep adaptive norms, 28-35 % of the base, in the CPU's memory; same result.",
    )
    offload: bool = family_field(
        "model",
        "offload",
        False,
        "keep blocks in the CPU's memory, two at a time on the GPU; same result, slower.",
    )
    text_encoder_3: Literal["load"] | None = family_field(
        "model", "text_encoder_3", "load", "null leaves the T5 out, as the pipeline allows."
    )
    max_sequence_length: PositiveInt | None = field(
        None, f"Tokens that the T5 reads; null means the pipeline's own number ({t5_tokens()})."
    )
    guidance_scale: float = family_field(
        "model",
        "guidance_scale",
        1.0,
        "guidance value passed to the dev model during training.",
        ge=0,
    )
    allow_schnell: bool = family_field(
        "model",
        "allow_schnell",
        False,
        "train the schnell model although training undoes its distillation.",
    )


class LoraConfig(Section):
    rank: PositiveInt = field(16, "Inner width of the low-rank update.")
    alpha: PositiveFloat | None = field(
        None, "The update is scaled by alpha / rank; null means alpha = rank."
    )
    dropout: float = field(0.0, "Dropout on the input of each LoRA layer.", ge=0, lt=1)
    target_modules: str | list[str] = field(
        "attention",
        "A preset (attention, attention+mlp, all-linear), a list of name endings, or one regex.",
    )
    blocks: list[str] | None = field(
        None, "Only layers in these blocks, such as [transformer_blocks.3].", min_length=1
    )
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal"] = field(
        "gaussian", "Initialization of lora_A."
    )
    use_dora: bool = field(False, "Weight-decomposed LoRA (DoRA).")
    use_rslora: bool = field(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    kohya: bool | None = field(
        None,
        "Also write the file that ComfyUI, A1111 and sd-scripts read; null: where readers need it.",
    )


class DataConfig(Section):
    instance_data_dir: Path | None = field(
        None, "Folder with the training pictures, in sub-folders too."
    )
    held_out_dir: Path | None = field(
        None, "Other pictures of the subject, used for evaluation only: held_out_loss."
    )
    dataset_name: str | None = field(
        None, "Instead of a folder: a `datasets` Hub name, local folder or .parquet file."
    )
    dataset_split: str = field("train", "Split of dataset_name.")
    image_column: str = field("image", "Column of dataset_name that holds the pictures.")
    caption_column: str | None = field(
        None,
        "Column of dataset_name, metadata.jsonl or metadata.csv with the captions; null: the first "
        "of text, caption and prompt in metadata, none of dataset_name.",
    )
    instance_prompt: str | None = field(None, "Caption of every picture that has none of its own.")
    class_data_dir: Path | None = field(
        None, "Folder of class pictures; null means OUTPUT_DIR/class_images."
    )
    class_prompt: str | list[str] | None = field(
        None,
        "What prior preservation protects: 'a photo of a dog', or several prompts that the class "
        "pictures take in turn.",
    )
    num_class_images: NonNegativeInt = field(
        0, "Number of class pictures; the base model generates those that are missing."
    )
    prior_loss_weight: float = field(1.0, "Weight of the prior-preservation loss.", ge=0)
    resolution: PositiveInt = field(
        512, "Side of the training pictures in pixels; a multiple of 8."
    )
    center_crop: bool = field(True, "Crop at the center; false crops at random.")
    random_flip: bool = field(False, "Mirror half of the pictures.")
    caption_dropout: float = field(
        0.0, "Share of captions that are replaced by the empty prompt.", ge=0, le=1
    )
    cache: bool = field(
        True, "Encode pictures and prompts once, and free the encoders; false encodes at each step."
    )
    cache_dir: Path | None = field(
        None, "Where encoded pictures are kept; null means OUTPUT_DIR/cache."
    )
    cache_variants: PositiveInt = field(4, "Random crops and flips kept for each picture.")
    bit_depth: Literal[8, 10, 12, 14, 16] | None = field(
        None, "Bits that gray pictures of 16 bits use, such as 12 of a microscope; null means 16."
    )
    skip_corrupt: bool = field(
        False, "Leave unreadable pictures out with a warning instead of stopping."
    )
    strict: bool = field(False, "Warnings about the data end the run before it trains.")

    @property
    def uses_prior(self) -> bool:
        return self.num_class_images > 0

    @property
    def class_prompts(self) -> list[str]:
        """Class picture i shows the prompt i modulo their number."""
        if isinstance(self.class_prompt, str):
            return [self.class_prompt]
        return self.class_prompt or []

    @property
    def num_variants(self) -> int:
        # without chance in the crop, one variant is all there is
        return self.cache_variants if self.random_flip or not self.center_crop else 1


class ObjectiveConfig(Section):
    stratified: bool = field(
        True, "Spread the times of each global batch evenly over the schedule."
    )
    snr_gamma: PositiveFloat | None = family_field(
        "objective", "snr_gamma", None, "min-SNR weighting (Hang et al. 2023); 5 is usual."
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
    )
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = family_field(
        "objective",
        "density",
        "logit_normal",
        "how often each time is trained (Esser et al. 2024).",
    )
    logit_mean: float = field(
        0.0, "Of logit_normal; t = 1 is noise: a value from the diffusers scripts changes sign."
    )
    logit_std: PositiveFloat = field(1.0, "Of logit_normal.")
    mode_scale: float = field(1.29, "Of mode.")
    shift: Literal["auto", "none"] | PositiveFloat = family_field(
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


class DreamBoothTrainConfig(TrainConfig):
    memory: Literal["fast", "balanced", "low", "lowest"] | None = field(
        None,
        "Preset for modulation_cache, gradient_checkpointing and quantization; scripts/plan.py "
        "reports what fits.",
    )
    gradient_checkpointing: Literal["selective"] | bool = field(
        False,
        "Recompute activations: less memory, about half more time; selective: every second block, "
        "half of both.",
    )
    compile: bool = field(
        False,
        "Compile the blocks of a transformer; faster steps after a minute or more at the start.",
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = field(
        "auto",
        "Kernel of the attention; auto: as PyTorch chooses. The others have no measurement yet.",
    )
    train_text_encoder: bool = field(False, "Train the text encoder too.")


class PromptsConfig(ValidationConfig):
    prompts: list[str] = field([], "Prompts to sample.")
    negative_prompt: str = field("", "Negative prompt of the samples.")
    num_images: PositiveInt = field(1, "Pictures per prompt.")
    num_inference_steps: PositiveInt = field(30, "Sampler steps.")
    guidance_scale: float = field(7.5, "Classifier-free guidance.", ge=0)
    seed: int = field(0, "Picture i of a prompt starts from the noise of seed + i.")
