"""What a model family is to the trainers: a diffusers pipeline, loaded in stages, and the lines in
which it differs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from trainers.config import LoraConfig, ModelConfig, ObjectiveConfig, PromptsConfig
from trainers.data.rng import SampleRng
from trainers.distributed.fsdp import ShardFunction, get_blocks
from trainers.efficiency.modulation import ModulationCache
from trainers.efficiency.offload import BlockOffload
from trainers.efficiency.quantize import load_quantized
from trainers.errors import UserError
from trainers.families.objectives import Objective, RectifiedFlow, resolution_shift
from trainers.lora.layers import LoraLinear, add_adapter

Condition = dict[
    str, Tensor
]  # keyword arguments of the denoiser, each (B, ...); cached as they are


# for the pipelines
PIPELINE_ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}


class Family(ABC):
    pipeline: type[DiffusionPipeline]
    denoiser_name = "transformer"
    clip_encoders: tuple[str, ...] = (
        "text_encoder",
    )  # those that LoRA can train: no reader loads it into a T5
    t5_encoder: str | None = None
    t5_tokens = 0  # how many it reads unless the config says otherwise, as the pipeline
    attention_layers: tuple[str, ...]  # the endings of the module names that LoRA presets name
    mlp_layers: tuple[str, ...]
    probe_time: float = 0.5  # a time in the middle of the schedule

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: ShardFunction | None = None,
    ) -> None:
        """Finds or downloads the base model. Raises: UserError when it cannot be had.

        shard: cuts a denoiser's frozen weights among the processes, see `processes.sharding`.
        """
        self.device, self.dtype, self.shard = torch.device(device), dtype, shard
        # they end with the family
        self.meta_model, self.component_digest = lru_cache(self.fresh), lru_cache(self.digest)
        self.variant, self.folder = model.variant, find_base_model(self.pipeline, model)
        self.quantization, self.modulation_cache = model.quantization, model.modulation_cache
        self.offload = model.offload
        # to settle, off the device
        self.starts_on_cpu = self.modulation_cache or self.offload or self.quantization == "fp8"
        self.needs_autocast = (
            True  # whether autocast must choose precisions, for a layer does not know its own
        )
        self.modulation: ModulationCache | None = None
        index = self.pipeline.load_config(self.folder)
        if index["_class_name"] != self.pipeline.__name__:
            raise UserError(
                f"model.family: {model.pretrained_model_name_or_path} is a "
                f"{index['_class_name']}, and {model.family} "
                f"trains a {self.pipeline.__name__}: change the one or the other"
            )
        self.components = {
            name: value for name, value in index.items() if isinstance(value, list) and value[0]
        }
        if model.text_encoder_3 is None:
            self.components = {
                name: value for name, value in self.components.items() if not name.endswith("_3")
            }
        self.text_encoder_names = sorted(
            name for name in self.components if name.startswith("text_encoder")
        )
        self.max_sequence_length = model.max_sequence_length or self.t5_tokens
        self.unload()

    # What differs

    def make_objective(self, config: ObjectiveConfig, resolution: int) -> Objective:
        """Rectified flow, unless overridden; `resolution` in pixels, 2 x 2 latents are a token."""
        options = config.model_dump(include={f.name for f in fields(RectifiedFlow)} - {"shift"})
        tokens = (resolution // self.vae_scale_factor // 2) ** 2
        shifts = {"auto": resolution_shift(self.pipe.scheduler.config, tokens), "none": 1.0}
        return RectifiedFlow(**options, shift=shifts.get(config.shift, config.shift))

    @abstractmethod
    def encode_text(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        """What the denoiser needs of the text encoder `name` for token ids (B, L);
        differentiable."""

    @abstractmethod
    def condition(self, text: dict[str, Tensor]) -> Condition:
        """The outputs of all text encoders as the denoiser takes them."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The regressed quantity for latents x_t (B, C, h, w) at times t (B,), shaped like x_t."""

    # What does not

    def load(self, *names: str) -> None:
        """Hold a pipeline with these heavy components only; scheduler and tokenizers always come
        along."""
        light_components = ("scheduler", *map(tokenizer_name, self.text_encoder_names))
        component_names = [
            part
            for part, value in self.pipeline.load_config(self.folder).items()
            if isinstance(value, list)
        ]
        components = {
            part: None for part in component_names if part not in (*names, *light_components)
        }
        if "safety_checker" in components:
            components["requires_safety_checker"] = False
        is_quantized = self.quantization in ("nf4", "int8")
        if is_quantized and self.denoiser_name in names:
            kind = getattr(diffusers, self.components[self.denoiser_name][1])
            source = (kind, self.folder, self.denoiser_name, self.variant)
            components[self.denoiser_name] = load_quantized(*source, self.dtype, self.quantization)
        self.pipe = self.pipeline.from_pretrained(
            self.folder, dtype=self.dtype, variant=self.variant, **components
        )
        self.pipe.set_progress_bar_config(disable=True)
        for name in names:
            module = getattr(self.pipe, name).requires_grad_(False).eval()
            if name != self.denoiser_name or not (is_quantized or self.shard or self.starts_on_cpu):
                module.to(self.device)
        if "vae" in names:
            self.pipe.vae.float()  # half precision costs quality, and SD 1.5's overflows in float16

    def apply_memory_options(self) -> None:
        """Once the denoiser has all its layers: leave adaptive norms' weights out, cut or offload
        the rest, as wanted.

        With fp8 they are 8 bits wide from now on but while their layer computes; LoRA's are not.
        What a layer saves for the backward pass is gone by then, so only checkpointed blocks can
        train.
        """
        if self.modulation_cache:
            self.modulation = ModulationCache(self.denoiser)
        if self.shard:
            self.shard(self.denoiser)
        if self.quantization == "fp8":
            self.denoiser.enable_layerwise_casting(torch.float8_e4m3fn, self.dtype)
        if self.offload:
            BlockOffload(get_blocks(self.denoiser), self.device)
        if self.starts_on_cpu and not self.shard:
            self.denoiser.to(self.device)

    def unload(self) -> None:
        self.pipe = self.modulation = None
        clear_device_cache(garbage_collection=True)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.denoiser_name)

    def fresh(self, part: str) -> nn.Module:
        """A model without weights, which may be changed; `meta_model` is one for all who only
        look."""
        library, kind = self.components[part]
        with torch.device("meta"):
            if library == "diffusers":
                kind = getattr(diffusers, kind)
                return kind.from_config(kind.load_config(self.folder, subfolder=part))
            kind = getattr(transformers, kind)
            return kind(kind.config_class.from_pretrained(self.folder, subfolder=part))

    @property
    def vae_config(self) -> dict:
        """A diffusers model's settings, with the defaults that its file leaves out."""
        return self.meta_model("vae").config

    @property
    def denoiser_config(self) -> dict:
        return self.meta_model(self.denoiser_name).config

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def digest(self, part: str) -> str:
        """Of a component's files and the precision that it runs in; computed once as
        `component_digest`."""
        digest = hashlib.sha256(
            f"{self.variant} {'float32' if part == 'vae' else self.dtype}".encode()
        )
        for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
            digest.update(path.name.encode())
            blob = path.resolve()  # the Hub's cache names large files by their sha256
            if len(blob.name) == 64:
                digest.update(blob.name.encode())
                continue
            with open(path, "rb") as file:
                while piece := file.read(2**24):
                    digest.update(piece)
        return digest.hexdigest()

    def denoise(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor]
    ) -> Tensor:
        """`predict` from the text encoders' outputs, in the base's precision."""
        condition = {name: value.to(self.dtype) for name, value in self.condition(text).items()}
        with torch.autocast(
            self.device.type,
            enabled=torch.is_autocast_enabled(self.device.type) and self.needs_autocast,
        ):
            return self.predict(denoiser, x_t.to(self.dtype), t, condition)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Posterior moments (2C, h, w) of one picture (3, H, W) in [-1, 1]; deterministic, so they
        can be cached."""
        return self.pipe.vae.encode(pixels[None].to(self.device)).latent_dist.parameters[0]

    def latents(self, moments: Tensor, rng: SampleRng) -> Tensor:
        """A fresh draw from moments (B, 2C, h, w) in the denoiser's units: (B, C, h, w)."""
        mean, logvar = moments.chunk(2, 1)
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * rng.normal(mean.shape)
        shift = self.vae_config.get("shift_factor") or 0.0
        return (z - shift) * self.vae_config["scaling_factor"]

    def tokenize(self, name: str, prompt: str) -> Tensor:
        """Token ids (L,) of the text encoder `name`, padded and cut to its length."""
        tokenizer = getattr(self.pipe, tokenizer_name(name))
        length = self.max_sequence_length if name == self.t5_encoder else tokenizer.model_max_length
        return torch.tensor(
            tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
        )

    @torch.no_grad()
    def encode_prompt(self, name: str, prompt: str) -> dict[str, Tensor]:
        """`encode_text` of one prompt, without the batch axis."""
        outputs = self.encode_text(name, self.tokenize(name, prompt)[None].to(self.device))
        return {key: value[0] for key, value in outputs.items()}

    def add_lora(self, config: LoraConfig, text_encoders: Sequence[str]) -> None:
        """Freeze everything and put LoRA layers in, float32 whatever the base's precision."""
        presets = {
            "attention": self.attention_layers,
            "attention+mlp": (*self.attention_layers, *self.mlp_layers),
        }
        add_adapter(self.denoiser, config, presets)
        text = config.model_copy(
            update={"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "blocks": None}
        )
        for name in text_encoders:
            add_adapter(getattr(self.pipe, name), text)
        adapted = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        self.needs_autocast = not all(isinstance(layer, LoraLinear) for layer in adapted)

    @torch.no_grad()
    def sample(
        self, prompt: str, validation: PromptsConfig, seed: int, size: int, encode=None
    ) -> Image.Image:
        """One picture of `size` pixels from the loaded pipeline; `encode` may replace
        `encode_prompt`."""
        conditions = []
        for words in (prompt, validation.negative_prompt):
            text = {}
            for name in self.text_encoder_names:
                text |= (encode or self.encode_prompt)(name, words)
            text = {key: value[None].to(self.device) for key, value in text.items()}
            conditions.append(
                {PIPELINE_ARGUMENTS[key]: value for key, value in self.condition(text).items()}
            )
        vae, half = self.pipe.vae, self.dtype != torch.float32
        if half:
            vae.to(self.dtype)
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            picture = self.pipe(
                **conditions[0],
                **{f"negative_{key}": value for key, value in conditions[1].items()},
                height=size,
                width=size,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
        if half:
            vae.float()
        return picture


def tokenizer_name(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def find_base_model(pipeline: type[DiffusionPipeline], model: ModelConfig) -> Path:
    """The local folder of the base model, downloaded if need be."""
    name = model.pretrained_model_name_or_path
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(
                f"model.pretrained_model_name_or_path: {name} has no model_index.json: it is no "
                f"pipeline"
            )
        return Path(name)
    try:
        return Path(pipeline.download(name, revision=model.revision, variant=model.variant))
    except Exception as error:
        raise UserError(
            f"model.pretrained_model_name_or_path: cannot get {name!r} from the Hub ({error}). "
            f"Check the name; for a "
            "gated model accept its licence on its page and log in with `hf auth login`; offline, "
            "give a local folder"
        ) from error
