"""What a model family is: a diffusers pipeline, and the lines in which it differs from others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainers.base_model import LoadedBase, tokenizer_name
from trainers.config import ObjectiveConfig
from trainers.config.family_facts import FamilyFacts, family_facts, family_names
from trainers.data.caption_checks import WordTokens
from trainers.data.rng import SampleRng
from trainers.data.transfer import send
from trainers.families.long_prompts import join_chunks, split_chunks, tokenize_chunks
from trainers.families.objective import Objective
from trainers.families.objectives import RectifiedFlow, resolution_shift
from trainers.families.vocabulary import split_word

Condition = dict[str, Tensor]  # the denoiser's keyword arguments, each (B, ...)

# the denoiser's arguments, and how the pipelines call them in their own signature
PIPELINE_ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
}


class Family(LoadedBase, ABC):
    """The equations of one family; its facts are in the YAML file with its module's name."""

    facts: ClassVar[FamilyFacts]
    clip_encoders: ClassVar[tuple[str, ...]]  # the text encoders that LoRA can train
    t5_encoder: ClassVar[str | None]  # the text encoder whose number of tokens can be chosen
    probe_time: float = 0.5  # a time in the middle of the schedule

    @property
    def max_side(self) -> int | None:
        """The longest side of a picture in pixels, if the denoiser has one."""
        return None

    def __init_subclass__(cls) -> None:
        """Give a new family its facts, and register it under its name."""
        name = cls.__module__.rpartition(".")[2]
        # a class elsewhere inherits the facts of a family, or states its own
        if name in family_names():
            cls.facts = family_facts(name)
            CLASSES[name] = cls
        encoders = cls.facts.text_encoders
        cls.clip_encoders = tuple(key for key, encoder in encoders.items() if encoder.lora)
        cls.t5_encoder = next((key for key, encoder in encoders.items() if encoder.tokens), None)

    @property
    def max_sequence_length(self) -> int:
        """How many tokens the T5 reads; 0 without one."""
        tokens = self.facts.text_encoders[self.t5_encoder].tokens if self.t5_encoder else 0
        return self.model.max_sequence_length or tokens

    def make_objective(self, config: ObjectiveConfig, latent_size: tuple[int, int]) -> Objective:
        """The objective that the base model was trained with: rectified flow, unless overridden.

        latent_size: height and width of the latents.
        """
        options = config.model_dump(include={f.name for f in fields(RectifiedFlow)} - {"shift"})
        # a token is a patch of 2 x 2 latents
        tokens = (latent_size[0] // 2) * (latent_size[1] // 2)
        shifts = {"auto": resolution_shift(self.pipe.scheduler.config, tokens), "none": 1.0}
        return RectifiedFlow(**options, shift=shifts.get(config.shift, config.shift))

    @abstractmethod
    def encode_text(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        """The outputs of the text encoder `name` for token ids (B, L) that the denoiser needs.

        They are differentiable, and their names are those that `condition` looks for.
        """

    @abstractmethod
    def condition(self, text: dict[str, Tensor]) -> Condition:
        """The outputs of all text encoders as the denoiser takes them.

        In training the geometry of the pictures is among them, which most denoisers do not take.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The quantity that the objective regresses, shaped like the latents x_t (B, C, h, w).

        t (B,) are times in the objective's units.
        """

    def pipeline_arguments(self, condition: Condition) -> dict[str, Tensor]:
        """The condition as keyword arguments of the pipeline's own call."""
        return {PIPELINE_ARGUMENTS[name]: value for name, value in condition.items()}

    def denoise(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor]
    ) -> Tensor:
        """`predict` from the text encoders' outputs, in the base model's precision."""
        condition = self.condition(text)
        for name, value in condition.items():
            # whole numbers, such as sizes in pixels, stay exact
            if value.is_floating_point():
                condition[name] = value.to(self.dtype)
        device = self.device.type
        # without autocast, which costs time, where every layer knows its precision
        enabled = torch.is_autocast_enabled(device) and self.needs_autocast
        with torch.autocast(device, enabled=enabled):
            return self.predict(denoiser, x_t.to(self.dtype), t, condition)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """The posterior's moments (2C, h, w) of one picture (3, H, W) in [-1, 1].

        They are deterministic, unlike a draw from them, so they can be cached.
        """
        return self.encode_images(pixels[None])[0]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """`encode_image` of several pictures of one size, (B, 3, H, W) -> (B, 2C, h, w)."""
        return self.pipe.vae.encode(send(pixels, self.device)).latent_dist.parameters

    def latents(self, moments: Tensor, rng: SampleRng) -> Tensor:
        """A new draw (B, C, h, w) from moments (B, 2C, h, w), in the denoiser's units."""
        mean, logvar = moments.chunk(2, 1)
        # diffusers bounds the log-variance alike
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * rng.normal(mean.shape)
        shift = self.vae_config.get("shift_factor") or 0.0
        return (z - shift) * self.vae_config["scaling_factor"]

    def num_chunks(self, name: str) -> int:
        """In how many chunks a text encoder reads a prompt, see `long_prompts`."""
        return self.model.clip_chunks if name in self.clip_encoders else 1

    def tokenize(self, name: str, prompt: str) -> Tensor:
        """The token ids (L,) of a prompt for the text encoder `name`, padded and cut to L.

        Of n chunks they are (n L,), each chunk with its own beginning and end.
        """
        tokenizer = getattr(self.pipe, tokenizer_name(name))
        if self.num_chunks(name) > 1:
            return tokenize_chunks(tokenizer, prompt, self.num_chunks(name))
        length = self.max_sequence_length if name == self.t5_encoder else tokenizer.model_max_length
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(tokens.input_ids)

    def count_tokens(self, name: str, prompt: str) -> tuple[int, int, str]:
        """How many tokens a prompt has, how many `tokenize` keeps, and the text of the others."""
        tokenizer = getattr(self.pipe, tokenizer_name(name))
        ids, length = tokenizer(prompt, verbose=False).input_ids, len(self.tokenize(name, prompt))
        # but for the first chunk, the marks of beginning and end are no tokens of the prompt
        length -= 2 * (self.num_chunks(name) - 1)
        # the last token that is kept marks the end
        rest = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
        return len(ids), length, rest

    def encode_ids(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        """`encode_text` of what `tokenize` gives, as a batch; chunks are encoded one by one."""
        chunks = self.num_chunks(name)
        if chunks == 1:
            return self.encode_text(name, ids)
        return join_chunks(self.encode_text(name, split_chunks(ids, chunks)), chunks)

    def split_word(self, name: str, word: str) -> WordTokens:
        """How the tokenizer of the text encoder `name` splits a word, and what it takes it for."""
        return split_word(getattr(self.pipe, tokenizer_name(name)), word, self.folder / name)

    @torch.no_grad()
    def encode_prompt(self, name: str, prompt: str) -> dict[str, Tensor]:
        """`encode_ids` of one prompt, without the batch axis."""
        outputs = self.encode_prompts(name, self.tokenize(name, prompt)[None])
        return {key: value[0] for key, value in outputs.items()}

    @torch.no_grad()
    def encode_prompts(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        """`encode_ids` without gradients; the ids need not be on the device."""
        return self.encode_ids(name, send(ids, self.device))


CLASSES: dict[str, type[Family]] = {}  # families whose modules have been imported


class Families(Mapping[str, type[Family]]):
    """The families by their names in a config, which are those of the YAML files beside this.

    A family's module is imported when it is looked up. Raises: KeyError for another name.
    """

    def __getitem__(self, name: str) -> type[Family]:
        if name not in family_names():
            raise KeyError(name)
        if name not in CLASSES:
            import_module(f"trainers.families.{name}")
        return CLASSES[name]

    def __iter__(self) -> Iterator[str]:
        return iter(family_names())

    def __len__(self) -> int:
        return len(family_names())


FAMILIES = Families()
