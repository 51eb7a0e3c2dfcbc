"""The sections of a DreamBooth config: every key with its default, help and limits."""

from __future__ import annotations

from typing import Literal

from trainers.config.base_sections import (
    PRECISION_HELP,
    MixedPrecision,
    Section,
    TrainConfig,
    ValidationConfig,
    field,
)
from trainers.config.bounds import Guidance, Name, NameOrPath, Prompt, Seed
from trainers.config.family_facts import (
    default_family,
    family_facts,
    family_field,
    family_names,
)
from trainers.config.sample_prompts import PromptItems, SamplePrompt, as_settings

FamilyName = Literal[family_names()]


def t5_tokens() -> str:
    """How many tokens each family's T5 reads."""
    parts = []
    for name in family_names():
        facts = family_facts(name)
        parts += [f"{facts.title}: {e.tokens}" for e in facts.text_encoders.values() if e.tokens]
    return ", ".join(parts)


class ModelConfig(Section):
    """The base model: where it is found, and in what form it is held in memory."""

    family: FamilyName = field(default_family(), "Which architecture the base model has.")
    pretrained_model_name_or_path: NameOrPath = field(
        family_facts(default_family()).default_base,
        "Hub repository or local folder in the diffusers layout, or one .safetensors file.",
    )
    config: NameOrPath | None = field(
        None,
        "Of a base in one file: the Hub repository or folder in the diffusers layout that has its "
        "settings and the parts that it lacks; null means the family's first base.",
    )
    revision: Name | None = field(None, "Branch, tag or commit of the Hub repository.")
    variant: Name | None = field(None, "Weight file variant, such as fp16.")
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
    max_sequence_length: int | None = field(
        None,
        f"Tokens that the T5 reads; null means the pipeline's own number ({t5_tokens()}).",
        ge=1,
        le=512,
    )
    clip_chunks: int = family_field(
        "model",
        "clip_chunks",
        1,
        "chunks of 75 tokens in which CLIP reads a prompt; more for long prompts, in samples too.",
        ge=1,
        le=8,
    )
    guidance_scale: Guidance = family_field(
        "model",
        "guidance_scale",
        1.0,
        "guidance value passed to the dev model during training.",
    )
    allow_schnell: bool = family_field(
        "model",
        "allow_schnell",
        False,
        "train the schnell model although training undoes its distillation.",
    )


class DreamBoothTrainConfig(TrainConfig):
    """How long is trained, on how many pictures at a time, and with how much memory."""

    mixed_precision: MixedPrecision = field("auto", PRECISION_HELP)
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
    """The prompts that are sampled while training and at the end."""

    prompts: PromptItems = field(
        [], "Prompts to sample: texts, or sections with a prompt and settings of its own."
    )
    negative_prompt: Prompt = field("", "Negative prompt of the samples.")
    num_images: int = field(1, "Pictures per prompt.", ge=1, le=10_000)
    num_inference_steps: int = field(30, "Sampler steps.", ge=1, le=1000)
    guidance_scale: Guidance = field(7.5, "Classifier-free guidance.")
    seed: Seed = field(0, "Picture i of a prompt starts from the noise of seed + i.")
    likeness_pictures: int = field(
        0,
        "Pictures of the subject, and as many of the class, that each validation draws and "
        "compares with the photos; they take as long as samples do. 0: none.",
        ge=0,
        le=1000,
    )
    likeness_network: NameOrPath | None = field(
        None,
        "DINO network that compares them: a folder, or a name in the Hub's cache; null: DINOv2 or "
        "CLIP, whichever is there.",
    )

    @property
    def draws_pictures(self) -> bool:
        """Whether anything is sampled while the run trains."""
        return bool(self.prompts) or self.likeness_pictures > 0

    @property
    def samples(self) -> list[SamplePrompt]:
        """Each prompt with its own settings, if it has any."""
        return as_settings(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The prompts alone."""
        return [sample.prompt for sample in self.samples]

    @property
    def negative_texts(self) -> list[str]:
        """The negative prompt of all prompts, and those that prompts have of their own."""
        own = [sample.negative_prompt for sample in self.samples]
        return [self.negative_prompt, *(text for text in own if text is not None)]

    def largest_size(self, side: int) -> tuple[int, int]:
        """Width and height of the sample with most pixels; side: of those that name none."""
        sizes = [(side, side), *(sample.sides(side) for sample in self.samples)]
        return max(sizes, key=lambda size: size[0] * size[1])

    def with_own(self, sample: SamplePrompt) -> PromptsConfig:
        """The settings for one prompt: its own, and those of all prompts where it has none."""
        keys = ("negative_prompt", "seed", "num_inference_steps", "guidance_scale")
        own = {key: getattr(sample, key) for key in keys}
        return self.model_copy(update={k: v for k, v in own.items() if v is not None})
