"""What a model family is to the trainers: a diffusers pipeline, loaded in stages, and the lines in which it differs."""

from __future__ import annotations

import gc
import hashlib
from abc import ABC, abstractmethod
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..config import LoraConfig, ModelConfig, ObjectiveConfig, ValidationConfig
from ..draws import Draws
from ..lora import add_adapter
from ..objectives import Objective

Condition = dict[str, Tensor]  # keyword arguments of the denoiser, each (B, ...); cached as they are


class Family(ABC):
    pipeline: type[DiffusionPipeline]
    denoiser_name = "transformer"
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")  # what a cached condition depends on
    text_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    attention: tuple[str, ...]  # the endings of the module names that LoRA presets name
    mlp: tuple[str, ...]

    def __init__(
        self, model: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Finds or downloads the base model. Raises: UserError when it cannot be had."""
        self.device, self.dtype = torch.device(device), dtype
        self.variant, self.folder = model.variant, find(self.pipeline, model)
        self.release()

    # What differs -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_objective(self, config: ObjectiveConfig) -> Objective: ...

    @abstractmethod
    def encode_tokens(self, tokens: dict[str, Tensor]) -> Condition:
        """Token ids, each (B, L), to the denoiser's conditions by the text encoders; differentiable."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The regressed quantity for latents x_t (B, C, h, w) at times t (B,), shaped like x_t."""

    @abstractmethod
    def pipeline_inputs(self, condition: Condition, negative: Condition) -> dict[str, Tensor]:
        """The pipeline's names for conditions that were encoded before."""

    # What does not ----------------------------------------------------------------------------------------------------

    def load(self, *names: str) -> None:
        """Hold a pipeline with these heavy components only; scheduler and tokenizers always come along."""
        light = ("scheduler", "tokenizer")
        parts = [k for k, v in self.pipeline.load_config(self.folder).items() if isinstance(v, list)]
        absent = {part: None for part in parts if part not in names and not part.startswith(light)}
        if "safety_checker" in parts:
            absent["requires_safety_checker"] = False
        self.pipe = self.pipeline.from_pretrained(self.folder, dtype=self.dtype, variant=self.variant, **absent)
        self.pipe.set_progress_bar_config(disable=True)
        for name in names:
            getattr(self.pipe, name).to(self.device).requires_grad_(False).eval()
        if "vae" in names:
            self.pipe.vae.float()  # half precision costs quality, and SD 1.5's overflows in float16

    def release(self) -> None:
        self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self.pipe, name) for name in self.text_encoder_names]

    @cached_property
    def scheduler(self) -> SchedulerMixin:
        return self.pipe.scheduler

    @cached_property
    def vae_config(self) -> dict:
        return AutoencoderKL.load_config(self.folder, subfolder="vae")

    @lru_cache  # noqa: B019
    def identity(self, part: str) -> str:
        """A digest of a component's files and the precision that it runs in."""
        digest = hashlib.sha256(f"{self.variant} {'float32' if part == 'vae' else self.dtype}".encode())
        for path in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
            digest.update(path.name.encode())
            blob = path.resolve()  # the Hub's cache names large files by their sha256
            digest.update(blob.name.encode() if len(blob.name) == 64 else path.read_bytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Posterior moments (2C, h, w) of one picture (3, H, W) in [-1, 1]; deterministic, so they can be cached."""
        return self.pipe.vae.encode(pixels[None].to(self.device)).latent_dist.parameters[0]

    def latents(self, moments: Tensor, rng: Draws) -> Tensor:
        """A fresh draw from moments (B, 2C, h, w) in the denoiser's units: (B, C, h, w)."""
        posterior = DiagonalGaussianDistribution(moments)
        z = posterior.mean + posterior.std * rng.normal(posterior.mean.shape)
        return (z - (self.vae_config.get("shift_factor") or 0.0)) * self.vae_config["scaling_factor"]

    def tokenize(self, prompt: str) -> dict[str, Tensor]:
        """{"input_ids": (L,)}, padded and cut to the tokenizer's length."""
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
        return {"input_ids": torch.tensor(ids.input_ids)}

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Condition:
        """The condition of one prompt, without the batch axis."""
        tokens = {name: ids[None].to(self.device) for name, ids in self.tokenize(prompt).items()}
        return {name: value[0] for name, value in self.encode_tokens(tokens).items()}

    def add_lora(self, config: LoraConfig, train_text_encoder: bool) -> None:
        """Freeze everything and put LoRA layers in, float32 whatever the base's precision."""
        add_adapter(self.denoiser, config, self.targets(config.target_modules))
        for encoder in self.text_encoders if train_text_encoder else ():
            add_adapter(encoder, config, list(self.text_targets))

    def targets(self, wanted: str | list[str]) -> str | list[str]:
        """A preset's module names; lists and regexes pass."""
        if wanted == "all-linear":
            return [name for name, module in self.denoiser.named_modules() if isinstance(module, nn.Linear)]
        presets = {"attention": [*self.attention], "attention+mlp": [*self.attention, *self.mlp]}
        return presets.get(wanted, wanted) if isinstance(wanted, str) else wanted

    @torch.no_grad()
    def sample(self, prompt: str, validation: ValidationConfig, seed: int, size: int, encoder=None) -> Image.Image:
        """One picture of `size` pixels from the loaded pipeline; `encoder` supplies prompts encoded before."""
        if encoder is None:
            text = {"prompt": prompt, "negative_prompt": validation.negative_prompt}
        else:
            pair = [encoder.condition(p) for p in (prompt, validation.negative_prompt)]
            text = self.pipeline_inputs(*({k: v[None].to(self.device) for k, v in c.items()} for c in pair))
        vae, half = self.pipe.vae, self.dtype != torch.float32
        if half:
            vae.to(self.dtype)
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            picture = self.pipe(
                **text,
                height=size,
                width=size,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
        if half:
            vae.float()
        return picture


def find(pipeline: type[DiffusionPipeline], model: ModelConfig) -> Path:
    """The local folder of the base model, downloaded if need be."""
    name = model.pretrained_model_name_or_path
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(
                f"model.pretrained_model_name_or_path: {name} has no model_index.json, so it is no pipeline"
            )
        return Path(name)
    try:
        return Path(pipeline.download(name, revision=model.revision, variant=model.variant))
    except Exception as error:
        raise UserError(
            f"model.pretrained_model_name_or_path: cannot get {name!r} from the Hub ({error}). Check the name; for a "
            "gated model accept its licence on its page and log in with `hf auth login`; offline, give a local folder"
        ) from error
