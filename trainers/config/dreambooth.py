"""The config of DreamBooth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trainers.config.base import (
    Config,
    Section,
    TrainConfig,
    ValidationConfig,
    field,
    irrelevant_keys,
)


class ModelConfig(Section):
    family: Literal["sd15", "sd3", "flux"] = field("sd15", "Which architecture the base model has.")
    pretrained_model_name_or_path: str = field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Hub repository or local folder in the diffusers layout.",
    )
    revision: str | None = field(None, "Branch, tag or commit of the Hub repository.")
    variant: str | None = field(None, "Weight file variant, such as fp16.")
    quantization: Literal["none", "nf4", "int8", "fp8"] = field(
        "none", "Keep the frozen base in 8 or 4 bits; LoRA on top stays float32 (QLoRA)."
    )
    modulation_cache: bool = field(
        False,
        "SD3, Flux.1: keep the weights of adaptive norms, 28-35 % of the base, in the CPU's "
        "memory; same result.",
    )
    offload: bool = field(
        False,
        "SD3, Flux.1: keep the frozen blocks in the CPU's memory, two at a time on the GPU; same "
        "result, slower.",
    )
    text_encoder_3: Literal["load"] | None = field(
        "load", "SD3: null leaves the T5 out, as the pipeline allows."
    )
    max_sequence_length: PositiveInt | None = field(
        None,
        "Tokens that the T5 reads; null means the pipeline's own number (SD3: 256, Flux.1: 512).",
    )
    guidance_scale: float = field(
        1.0, "Flux.1-dev: the guidance that the model is told while it trains.", ge=0
    )
    allow_schnell: bool = field(
        False, "Flux.1-schnell: train it although training undoes its distillation."
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
        "gaussian", "How lora_A starts."
    )
    use_dora: bool = field(False, "Weight-decomposed LoRA (DoRA).")
    use_rslora: bool = field(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    kohya: bool | None = field(
        None,
        "Also write the file that ComfyUI, A1111 and sd-scripts read; null: for SD1.5, where they "
        "need it.",
    )


class DataConfig(Section):
    instance_data_dir: Path | None = field(None, "Folder with the pictures to learn.")
    held_out_dir: Path | None = field(
        None, "Other pictures of the subject, only measured on: held_out_loss."
    )
    dataset_name: str | None = field(
        None, "Instead of a folder: a `datasets` Hub name, local folder or .parquet file."
    )
    dataset_split: str = field("train", "Split of dataset_name.")
    image_column: str = field("image", "Column of dataset_name that holds the pictures.")
    caption_column: str | None = field(
        None, "Column of dataset_name (or metadata.jsonl) that holds the captions."
    )
    instance_prompt: str | None = field(None, "Caption of every picture that has none of its own.")
    class_data_dir: Path | None = field(
        None, "Folder of class pictures; null means OUTPUT_DIR/class_images."
    )
    class_prompt: str | list[str] | None = field(
        None,
        "What must be kept: 'a photo of a dog', or several prompts that the class pictures take "
        "in turn.",
    )
    num_class_images: NonNegativeInt = field(
        0, "Class pictures wanted; the base model makes those missing."
    )
    prior_loss_weight: float = field(1.0, "Weight of the prior-preservation loss.", ge=0)
    resolution: PositiveInt = field(
        512, "Side of the training pictures in pixels; a multiple of 8."
    )
    center_crop: bool = field(True, "Crop at the centre; false crops at random.")
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
    skip_corrupt: bool = field(
        False, "Leave unreadable pictures out with a warning instead of stopping."
    )

    @property
    def uses_prior(self) -> bool:
        return self.num_class_images > 0

    @property
    def class_prompts(self) -> list[str]:
        """Class picture i shows the prompt i modulo their number."""
        return (
            [self.class_prompt] if isinstance(self.class_prompt, str) else self.class_prompt or []
        )

    @property
    def num_variants(self) -> int:
        return self.cache_variants if self.random_flip or not self.center_crop else 1


class ObjectiveConfig(Section):
    stratified: bool = field(
        True, "Spread the times of each global batch evenly over the schedule."
    )
    snr_gamma: PositiveFloat | None = field(
        None, "SD1.5: min-SNR weighting (Hang et al. 2023); 5 is usual."
    )
    debiased: bool = field(False, "SD1.5: weight by 1 / sqrt(SNR) (Yu et al. 2023).")
    noise_offset: float = field(
        0.0, "SD1.5: adds a constant per channel to the noise: darker, lighter pictures.", ge=0
    )
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = field(
        "logit_normal", "SD3, Flux.1: how often each time is trained (Esser et al. 2024)."
    )
    logit_mean: float = field(
        0.0, "Of logit_normal; t = 1 is noise: a value from the diffusers scripts changes sign."
    )
    logit_std: PositiveFloat = field(1.0, "Of logit_normal.")
    mode_scale: float = field(1.29, "Of mode.")
    shift: Literal["auto", "none"] | PositiveFloat = field(
        "auto",
        "SD3, Flux.1: towards noise, for large pictures; auto does as the model's own scheduler.",
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = field(
        "none", "SD3, Flux.1: weight of the loss at each time."
    )
    precondition: bool = field(
        False, "SD3, Flux.1: the loss of x0 instead of v, as the diffusers script for SD3."
    )


MEMORY_PRESETS = {  # preset: what it sets where the config says nothing
    "fast": {},
    "balanced": {
        "model": {"modulation_cache": True},
        "train": {"gradient_checkpointing": "selective"},
    },
    "low": {"model": {"modulation_cache": True}, "train": {"gradient_checkpointing": True}},
    "lowest": {"model": {"quantization": "nf4"}, "train": {"gradient_checkpointing": True}},
}


class DreamBoothTrainConfig(TrainConfig):
    memory: Literal["fast", "balanced", "low", "lowest"] | None = field(
        None,
        "Preset for modulation_cache, gradient_checkpointing and quantization; scripts/plan.py "
        "tells what fits.",
    )
    gradient_checkpointing: Literal["selective"] | bool = field(
        False,
        "Recompute activations: less memory, about half more time; selective: every second block, "
        "half of both.",
    )
    compile: bool = field(
        False, "SD3, Flux.1: compile the blocks; faster steps after a minute or more at the start."
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = field(
        "auto",
        "Kernel of the attention; auto measures on a GPU which is fastest for the run's shapes.",
    )
    cuda_graphs: bool = field(
        False,
        "Launch the denoiser's kernels at once; for small batches on one CUDA GPU. Has not been "
        "run by us.",
    )
    train_text_encoder: bool = field(False, "Train the text encoder too.")


class PromptsConfig(ValidationConfig):
    prompts: list[str] = field([], "Prompts to sample.")
    negative_prompt: str = field("", "Negative prompt of the samples.")
    num_images: PositiveInt = field(1, "Pictures per prompt.")
    num_inference_steps: PositiveInt = field(30, "Sampler steps.")
    guidance_scale: float = field(7.5, "Classifier-free guidance.", ge=0)
    seed: int = field(0, "Picture i of a prompt starts from the noise of seed + i.")


KEYS_BY_FAMILY = [  # families, section, keys
    ("sd15", "objective", "snr_gamma debiased noise_offset"),
    (
        "sd3 flux",
        "objective",
        "density logit_mean logit_std mode_scale shift weighting precondition",
    ),
    ("sd3 flux", "model", "max_sequence_length modulation_cache offload"),
    ("sd3", "model", "text_encoder_3"),
    ("flux", "model", "guidance_scale allow_schnell"),
]


class DreamBoothConfig(Config):
    kind: Literal["dreambooth"] = field("dreambooth", "Which trainer runs.")
    output_dir: Path = field(
        Path("runs/dreambooth"), "The run folder: everything that the run writes."
    )
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = field(LoraConfig(), "LoRA settings; null trains all weights.")
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: DreamBoothTrainConfig = DreamBoothTrainConfig()
    validation: PromptsConfig = PromptsConfig()

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, tree: Any) -> Any:
        """What `train.memory` stands for, written out; what a run cannot have is left out."""
        parts = (
            {name: tree.get(name) or {} for name in ("model", "train")}
            if isinstance(tree, dict)
            else {}
        )
        if not parts or not all(isinstance(part, dict) for part in parts.values()):
            return tree
        preset = MEMORY_PRESETS.get(str(parts["train"].get("memory")), {})
        is_frozen = tree.get("lora", {}) is not None
        can_cache_modulation = (
            is_frozen
            and parts["model"].get("family", "sd15") != "sd15"
            and not parts["train"].get("train_text_encoder")
        )
        possible = {"modulation_cache": can_cache_modulation, "quantization": is_frozen}
        for section, values in preset.items():
            parts[section] = {k: v for k, v in values.items() if possible.get(k, True)} | parts[
                section
            ]
        return tree | parts if preset else tree

    @property
    def applied_presets(self) -> dict[str, dict[str, Any]]:
        keys = {"model": ["modulation_cache", "quantization"], "train": ["gradient_checkpointing"]}
        values = {
            f"{part}.{key}": getattr(getattr(self, part), key)
            for part, names in keys.items()
            for key in names
        }
        return {f"train.memory={self.train.memory}": values} if self.train.memory else {}

    @property
    def writes_kohya(self) -> bool:
        """Whether a kohya file is written."""
        if self.lora is None or self.lora.kohya is not None:
            return self.lora is not None and self.lora.kohya
        return self.model.family == "sd15" and not self.lora.use_dora

    def memory_suggestions(self) -> Iterator[str]:
        if not self.data.cache:
            yield "data.cache=true: the encoders are freed before training, faster too"
        yield from super().memory_suggestions()
        if not self.train.gradient_checkpointing:
            yield "train.gradient_checkpointing=selective: the same result, about 20 % slower"
        if self.train.gradient_checkpointing is not True:
            yield "train.gradient_checkpointing=true: the same result, about 40 % slower"
        if self.optimizer.name in ("adamw", "prodigy") and (
            self.lora is None or self.train.train_text_encoder
        ):
            yield "optimizer.name=adamw_8bit: a quarter of the optimiser's memory, slightly rounded"
        is_unquantized = self.lora and self.model.quantization == "none"
        if (
            is_unquantized
            and self.model.family != "sd15"
            and not (self.model.modulation_cache or self.train.train_text_encoder)
        ):
            yield "model.modulation_cache=true: a third of the base's memory less, the same result"
        if is_unquantized:
            yield (
                "--config_file accelerate_configs/fsdp2.yaml: the base is cut among several "
                "GPUs, the same result"
            )
            yield "model.quantization=nf4: a quarter of the base's memory, rounded"
        if self.train.train_text_encoder:
            yield "train.train_text_encoder=false: the text encoders are freed"
        if self.data.resolution > 64:
            yield f"data.resolution={self.data.resolution * 3 // 4 // 16 * 16}: less detail"

    def required_packages(self) -> Iterator[tuple[str, str, str]]:
        yield from super().required_packages()
        if self.model.quantization in ("nf4", "int8"):
            yield "model.quantization", self.model.quantization, "bitsandbytes"

    def incompatible_options(self) -> Iterator[tuple[str, str]]:
        """Options for speed, with what they cannot be had with."""
        train, model, lora = self.train, self.model, self.lora
        moves_weights = {
            "model.quantization": model.quantization != "none",
            "model.offload": model.offload,
        }
        conflicts = {
            "compile": moves_weights | {"lora.use_dora": lora and lora.use_dora},
            "cuda_graphs": moves_weights
            | {
                "model.modulation_cache": model.modulation_cache,
                "lora.dropout": lora and lora.dropout,
                "train.compile": train.compile,
                "train.gradient_checkpointing": train.gradient_checkpointing,
                "train.gradient_accumulation_steps": train.gradient_accumulation_steps > 1,
                "train.auto_micro_batch": train.auto_micro_batch,
                "train.train_text_encoder": train.train_text_encoder,
            },
        }
        for name, others in conflicts.items():
            if others := [
                other for other, is_set in others.items() if is_set and getattr(train, name)
            ]:
                yield (
                    f"train.{name}",
                    f"cannot be had with {', '.join(others)}: drop the one or the other",
                )
        if train.compile and model.family == "sd15":
            yield (
                "train.compile",
                "gave SD1.5 wrong gradients (PyTorch 2.13 on a CPU): for SD3.5 and Flux.1 only",
            )

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        data, model = self.data, self.model
        if data.instance_data_dir is None and data.dataset_name is None:
            yield "data.instance_data_dir", "no pictures: give a folder here, or data.dataset_name"
        if data.instance_data_dir is not None and data.dataset_name is not None:
            yield (
                "data.dataset_name",
                "two sources of pictures: drop this or data.instance_data_dir",
            )
        if data.instance_data_dir is not None and not data.instance_data_dir.is_dir():
            yield "data.instance_data_dir", f"no such folder: {data.instance_data_dir}"
        if data.held_out_dir is not None and not data.held_out_dir.is_dir():
            yield "data.held_out_dir", f"no such folder: {data.held_out_dir}"
        if data.class_data_dir is not None and data.num_class_images == 0:
            yield (
                "data.class_data_dir",
                "class pictures without data.num_class_images: say how many to use",
            )
        if data.uses_prior and not data.class_prompt:
            yield (
                "data.class_prompt",
                "prior preservation (data.num_class_images > 0) needs a class prompt",
            )
        if data.class_prompt and not data.uses_prior:
            yield (
                "data.num_class_images",
                "a class prompt without class pictures: say how many to use, 100 is usual",
            )
        flow = model.family != "sd15"
        if data.resolution % (16 if flow else 8):
            yield (
                "data.resolution",
                f"must be a multiple of {16 if flow else 8}, not {data.resolution}",
            )
        yield from irrelevant_keys(self, model.family, KEYS_BY_FAMILY)
        if model.quantization != "none" and self.lora is None:
            yield (
                "model.quantization",
                "a quantised base cannot train all its weights: give lora, or drop this",
            )
        if model.modulation_cache and (self.lora is None or self.train.train_text_encoder):
            yield (
                "model.modulation_cache",
                "needs a frozen base and text encoders: their outputs are computed ahead",
            )
        if model.modulation_cache and model.quantization in ("nf4", "int8"):
            yield (
                "model.modulation_cache",
                f"{model.quantization} has made these weights small: drop this or that",
            )
        if model.offload and (self.lora is None or self.train.gradient_checkpointing is not True):
            yield (
                "model.offload",
                "needs lora, and train.gradient_checkpointing: true to bring each block back",
            )
        if model.offload and model.quantization != "none":
            yield (
                "model.offload",
                f"{model.quantization} has made the blocks small: drop this or that",
            )
        if model.quantization == "fp8" and model.family == "sd15":
            yield (
                "model.quantization",
                "fp8 is for transformers; the U-Net of SD1.5 trains with nf4 or int8",
            )
        elif model.quantization == "fp8" and self.train.gradient_checkpointing is not True:
            yield (
                "model.quantization",
                "fp8 needs train.gradient_checkpointing: true, for its weights come and go",
            )
        yield from self.incompatible_options()
        if self.objective.debiased and self.objective.snr_gamma:
            yield "objective.debiased", "two weightings: drop this or objective.snr_gamma"
        if self.optimizer.text_encoder_lr is not None and not self.train.train_text_encoder:
            yield (
                "optimizer.text_encoder_lr",
                "the text encoder does not train: set train.train_text_encoder: true",
            )
        if self.lora and self.lora.use_dora and self.lora.kohya:
            yield "lora.kohya", "kohya's file holds plain LoRA: drop this or lora.use_dora"
        if self.lora and self.lora.use_dora and self.train.train_text_encoder:
            yield (
                "lora.use_dora",
                "no reader loads DoRA into a text encoder: drop this or train.train_text_encoder",
            )
        if isinstance(self.lora and self.lora.target_modules, str):
            try:
                re.compile(self.lora.target_modules)
            except re.error as error:
                yield "lora.target_modules", f"not a valid regex: {error}"
