"""Encoded pictures and prompts on disk.

An entry's key tells everything that it depends on: an entry may be unused, but never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.batched_encoding import BatchEncoder, decode_views
from trainers.data.caption_variants import distinct_texts, subject_prompts
from trainers.data.crops import Crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.masks import latent_mask
from trainers.data.pictures import Picture
from trainers.data.tensor_cache import TensorCache, cache_key
from trainers.errors import RunFailedError
from trainers.progress import track

MAX_KEYS = 65536  # prompts' token ids that are remembered

View = tuple[Picture, Crop]


class Encoders(Protocol):
    """What the cache needs of a model family: encoders loaded by name and freed together."""

    text_encoder_names: Sequence[str]
    long_encoder: str | None
    max_sequence_length: int

    def load(self, *names: str) -> None: ...
    def unload(self) -> None: ...
    def component_digest(self, part: str) -> str: ...
    def tokenizer_digest(self, text_encoder: str) -> str: ...
    def num_chunks(self, name: str) -> int: ...
    def tokenize(self, name: str, prompt: str) -> Tensor: ...
    def encode_prompt(self, name: str, prompt: str) -> dict[str, Tensor]: ...
    def encode_image(self, pixels: Tensor) -> Tensor: ...
    def encode_images(self, pixels: Tensor) -> Tensor: ...
    def encode_prompts(self, name: str, ids: Tensor) -> dict[str, Tensor]: ...


class CachedEncoder:
    """The moments of pictures and the outputs of text encoders, read from the cache or encoded.

    Without a cache (`use_cache` is false) the family's encoders stay loaded and encode at each
    call. Nothing is cached of the text encoders `trained_encoders`, which are given token ids.
    """

    def __init__(
        self,
        family: Encoders,
        folder: Path,
        use_cache: bool,
        trained_encoders: Sequence[str],
        batch_size: int = 1,
    ) -> None:
        """batch_size: how many pictures or prompts are encoded at a time when the cache is
        filled."""
        self.family, self.use_cache, self.trained_encoders = family, use_cache, trained_encoders
        self.batch_size = batch_size
        self.cache = TensorCache(folder)
        # caches of the object, not of the class, so that they end with it
        self.token_ids = lru_cache(maxsize=MAX_KEYS)(family.tokenize)
        self.image_key = lru_cache(maxsize=MAX_KEYS)(self.compute_image_key)
        self.prompt_key = lru_cache(maxsize=MAX_KEYS)(self.compute_prompt_key)

    @property
    def loaded_encoders(self) -> Sequence[str]:
        """The names of the text encoders that must be loaded while this is used."""
        return self.trained_encoders if self.use_cache else self.family.text_encoder_names

    def moments(self, picture: Picture, crop: Crop) -> Tensor:
        """The posterior's mean and log-variance (2C, h, w) for a crop of a picture."""
        if not self.use_cache:
            return self.family.encode_image(crop(picture.decode()))
        return self.read_entry(self.image_key(picture, crop), picture.name)["moments"]

    def mask(self, picture: Picture, crop: Crop, size: Sequence[int]) -> Tensor:
        """Where that crop of a picture is learnt, (1, h, w) in 0..1; size: h and w."""
        if picture.mask is None or not self.use_cache:
            return latent_mask(picture, crop, *size)
        return self.read_entry(self.image_key(picture, crop), picture.name)["mask"]

    def text_inputs(self, prompt: str) -> dict[str, Tensor]:
        """The outputs of the frozen text encoders, and token ids {NAME_ids: (L,)} for the others.

        It is what `TrainableDenoiser` takes, for one prompt and so without the batch axis.
        """
        text = {}
        for name in self.family.text_encoder_names:
            if name in self.trained_encoders:
                text[f"{name}_ids"] = self.token_ids(name, prompt)
            else:
                text |= self.encoder_outputs(name, prompt)
        return text

    def encoder_outputs(self, name: str, prompt: str) -> dict[str, Tensor]:
        """The outputs of one text encoder with its present weights, without the batch axis."""
        if name in self.loaded_encoders:
            return self.family.encode_prompt(name, prompt)
        return self.read_entry(self.prompt_key(name, prompt), repr(prompt))

    def read_entry(self, key: str, name: str) -> dict[str, Tensor]:
        """The entry of a picture or prompt called `name`. Raises: RunFailedError if it is lost."""
        tensors = self.cache.read(key)
        if tensors is None:
            self.cache.discard(key)
            raise RunFailedError(
                f"The cached encoding of {name} was lost or damaged during the run: "
                "start the run again"
            )
        return tensors

    def compute_image_key(self, picture: Picture, crop: Crop) -> str:
        encoder = self.family.component_digest("vae")
        # pictures without masks keep the keys that they had before there were masks
        mask = {"mask": picture.mask.digest} if picture.mask else {}
        return cache_key(image=picture.digest, view=asdict(crop), encoder=encoder, **mask)

    def compute_prompt_key(self, name: str, prompt: str) -> str:
        parts = [self.family.component_digest(name), self.family.tokenizer_digest(name)]
        # how much the encoder reads, where it can be chosen and is
        length = self.family.max_sequence_length if name == self.family.long_encoder else None
        chunks = self.family.num_chunks(name)
        facts = {"chunks": chunks} if chunks > 1 else {}
        return cache_key(prompt=prompt, encoder=parts, length=length, **facts)

    def fill(
        self,
        crops: Iterable[tuple[Picture, Crop]],
        prompts: Iterable[str],
        accelerator: Accelerator,
    ) -> None:
        """Encode what is missing, shared among the processes, one encoder in memory at a time."""
        self.cache.load_states()
        wanted = self.entries(list(crops), list(prompts))
        rank, world_size = accelerator.process_index, accelerator.num_processes
        # the other processes' share is missing only where disks are not shared
        for is_own in (True, False):
            for encoder, entries in wanted.items():
                missing = {}
                for i, (key, source) in enumerate(entries):
                    is_assigned = (i % world_size == rank) == is_own
                    if is_assigned and not self.cache.is_intact(key):
                        missing[key] = source
                if missing:
                    self.encode(encoder, missing, accelerator)
            accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            self.cache.save_states()

    def entries(
        self, crops: Sequence[View], prompts: Sequence[str]
    ) -> dict[str, list[tuple[str, View | str]]]:
        """The keys of all entries of each encoder, and what it encodes for them."""
        views = [(self.image_key(*view), view) for view in crops]
        entries: dict[str, list[tuple[str, View | str]]] = {"vae": views}
        for name in self.family.text_encoder_names:
            if name not in self.trained_encoders:
                entries[name] = [(self.prompt_key(name, prompt), prompt) for prompt in prompts]
        return entries

    def encode(
        self, encoder: str, sources: dict[str, View | str], accelerator: Accelerator
    ) -> None:
        """Load an encoder, write its entries and free it."""
        self.family.load(encoder)
        if encoder == "vae":
            outputs = self.encode_views(sources.values())
        else:
            outputs = self.encode_prompts(encoder, sources.values())
        is_quiet = not accelerator.is_main_process
        for key in track(sources, f"encoding: {encoder}", disable=is_quiet):
            self.cache.write(key, next(outputs))
        self.family.unload()

    def encode_views(self, views: Iterable[View]) -> Iterator[dict[str, Tensor]]:
        def encode(pixels: list[Tensor]) -> list[dict[str, Tensor]]:
            rows = self.family.encode_images(torch.stack(pixels))
            return [{"moments": moments} for moments in rows]

        views = list(views)
        entries = BatchEncoder(self.batch_size)(encode, decode_views(views), kind=Tensor.size)
        for (picture, crop), entry in zip(views, entries, strict=True):
            if picture.mask:
                entry["mask"] = latent_mask(picture, crop, *entry["moments"].shape[-2:])
            yield entry

    def encode_prompts(self, name: str, prompts: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        def encode(ids: list[Tensor]) -> list[dict[str, Tensor]]:
            outputs = self.family.encode_prompts(name, torch.stack(ids))
            return [{key: rows[i] for key, rows in outputs.items()} for i in range(len(ids))]

        ids = (self.family.tokenize(name, prompt) for prompt in prompts)
        return BatchEncoder(self.batch_size)(encode, ids, kind=Tensor.size)


def fill_cache(
    encoder: CachedEncoder,
    batches: Sequence[DreamBoothBatches],
    config: DreamBoothConfig,
    accelerator: Accelerator,
) -> None:
    """Encode every view of the pictures and every prompt that a run will ask for."""
    crops = [*chain(*(part.crops() for part in batches))]
    # the empty prompt stands for captions that are dropped
    drawn = []
    if config.validation.likeness_pictures:
        drawn = [*subject_prompts(config.data), *config.data.class_prompts]
    kept = config.data.kept_prompts if config.data.preserves_outputs else []
    prompts = [*drawn, *kept, *config.validation.texts, *config.validation.negative_texts, ""]
    texts = distinct_texts((picture for picture, _ in crops), config.seed)
    encoder.fill(crops, texts | dict.fromkeys(prompts), accelerator)
