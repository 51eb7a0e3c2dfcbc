"""Encoded pictures and prompts on disk, keyed by everything they depend on: an entry may be unused,
but never wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from trainers.data.crops import Crop
from trainers.data.pictures import Picture
from trainers.errors import RunFailedError


class Encoders(Protocol):
    """The encoders of a base model, loaded by name and freed together; see `families.base`."""

    text_encoder_names: Sequence[str]
    t5_encoder: str | None
    max_sequence_length: int

    def load(self, *names: str) -> None: ...
    def unload(self) -> None: ...
    def component_digest(self, part: str) -> str: ...
    def tokenizer_digest(self, text_encoder: str) -> str: ...
    def tokenize(self, name: str, prompt: str) -> Tensor: ...
    def encode_prompt(self, name: str, prompt: str) -> dict[str, Tensor]: ...
    def encode_image(self, pixels: Tensor) -> Tensor: ...


class TensorCache:
    """Tensors by key: one safetensors file each, written aside and renamed, with a checksum of its
    content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = lru_cache(maxsize=512)(self._read_pinned)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None when there is none or it is damaged."""
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return (
                    tensors
                    if (file.metadata() or {}).get("sha256") == tensor_checksum(tensors)
                    else None
                )
        except (OSError, SafetensorError):
            return None

    def _read_pinned(self, key: str) -> dict[str, Tensor] | None:
        """The entry, where a copy to the GPU does not make the host wait."""
        tensors = self._read(key)
        if tensors and torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary, {"sha256": tensor_checksum(tensors)})
        temporary.replace(path)
        self.read.cache_clear()


def tensor_checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(**facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class CachedEncoder:
    """Moments per picture, and each text encoder's outputs per distinct prompt, read from the cache
    or encoded.

    Without a cache (`use_cache` false) the family's encoders stay loaded and encode at each call.
    Of the text encoders that
    `trained_encoders`, there are token ids, and nothing is cached.
    """

    def __init__(
        self, family: Encoders, folder: Path, use_cache: bool, trained_encoders: Sequence[str]
    ) -> None:
        self.family, self.use_cache, self.trained_encoders = family, use_cache, trained_encoders
        self.cache = TensorCache(folder)
        self.token_ids = lru_cache(maxsize=65536)(family.tokenize)
        self.image_key = lru_cache(maxsize=65536)(self._image_key)
        self.prompt_key = lru_cache(maxsize=65536)(self._prompt_key)

    @property
    def loaded_encoders(self) -> Sequence[str]:
        """The text encoders that must be loaded."""
        return self.trained_encoders if self.use_cache else self.family.text_encoder_names

    def moments(self, picture: Picture, crop: Crop) -> Tensor:
        """(2C, h, w), the posterior's mean and log-variance."""
        if not self.use_cache:
            return self.family.encode_image(crop(picture.decode()))
        return self.read_entry(self.image_key(picture, crop), picture.name)["moments"]

    def text_inputs(self, prompt: str) -> dict[str, Tensor]:
        """What `Denoiser` takes of one prompt."""
        text = {}
        for name in self.family.text_encoder_names:
            if name in self.trained_encoders:
                text[f"{name}_ids"] = self.token_ids(name, prompt)
            else:
                text |= self.encoder_outputs(name, prompt)
        return text

    def encoder_outputs(self, name: str, prompt: str) -> dict[str, Tensor]:
        """The outputs of one text encoder as it is now, without the batch axis."""
        if name in self.loaded_encoders:
            return self.family.encode_prompt(name, prompt)
        return self.read_entry(self.prompt_key(name, prompt), repr(prompt))

    def read_entry(self, key: str, name: str) -> dict[str, Tensor]:
        if (tensors := self.cache.read(key)) is None:
            raise RunFailedError(
                f"the cached encoding of {name} was lost or damaged during the run: start it again"
            )
        return tensors

    def _image_key(self, picture: Picture, crop: Crop) -> str:
        return cache_key(
            image=picture.digest, view=asdict(crop), encoder=self.family.component_digest("vae")
        )

    def _prompt_key(self, name: str, prompt: str) -> str:
        parts = [self.family.component_digest(name), self.family.tokenizer_digest(name)]
        length = self.family.max_sequence_length if name == self.family.t5_encoder else None
        return cache_key(prompt=prompt, encoder=parts, length=length)

    def fill(
        self,
        crops: Iterable[tuple[Picture, Crop]],
        prompts: Iterable[str],
        accelerator: Accelerator,
    ) -> None:
        """Encode what is missing, shared among the processes, with one encoder in memory at a
        time."""
        family, crops, prompts = self.family, list(crops), list(prompts)
        jobs_by_encoder = {
            "vae": [
                (self.image_key(picture, crop), partial(self.encode_view, picture, crop))
                for picture, crop in crops
            ]
        }
        for name in family.text_encoder_names:
            if name not in self.trained_encoders:
                jobs_by_encoder[name] = [
                    (self.prompt_key(name, p), partial(family.encode_prompt, name, p))
                    for p in prompts
                ]
        rank, world_size = accelerator.process_index, accelerator.num_processes
        for is_own in (True, False):  # the other processes' share is missing on unshared disks only
            for part, jobs in jobs_by_encoder.items():
                assigned = [job for i, job in enumerate(jobs) if (i % world_size == rank) == is_own]
                if missing := {key: job for key, job in assigned if self.cache._read(key) is None}:
                    family.load(part)
                    for key, job in tqdm(
                        missing.items(),
                        f"encoding: {part}",
                        disable=not accelerator.is_main_process,
                    ):
                        self.cache.write(key, job())
                    family.unload()
            accelerator.wait_for_everyone()

    def encode_view(self, picture: Picture, crop: Crop) -> dict[str, Tensor]:
        return {"moments": self.family.encode_image(crop(picture.decode()))}
