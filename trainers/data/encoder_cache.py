"""Encoded pictures and prompts on disk, keyed by everything they depend on: an entry may be unused, but never wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from trainers.data.crops import View
from trainers.data.pictures import Picture
from trainers.errors import RunFailedError
from trainers.families import Family
from trainers.families.base import tokenizer_of


class Cache:
    """Tensors by key: one safetensors file each, written aside and renamed, with a checksum of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = lru_cache(maxsize=512)(self._pinned)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None when there is none or it is damaged."""
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors if (file.metadata() or {}).get("sha256") == checksum(tensors) else None
        except (OSError, SafetensorError):
            return None

    def _pinned(self, key: str) -> dict[str, Tensor] | None:
        """The entry, where a copy to the GPU does not make the host wait."""
        tensors = self._read(key)
        if tensors and torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, aside, {"sha256": checksum(tensors)})
        aside.replace(path)
        self.read.cache_clear()


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key_of(**facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class CachedEncoder:
    """Moments per picture, and each text encoder's outputs per distinct prompt, read from the cache or encoded.

    Without a cache (`keep` false) the family's encoders stay loaded and encode at each call. Of the text encoders that
    `train`, there are token ids, and nothing is cached.
    """

    def __init__(self, family: Family, folder: Path, keep: bool, train: Sequence[str]) -> None:
        self.family, self.keep, self.train = family, keep, train
        self.cache = Cache(folder)
        self.tokens = lru_cache(maxsize=65536)(family.tokenize)
        self.image_key = lru_cache(maxsize=65536)(self._image_key)
        self.prompt_key = lru_cache(maxsize=65536)(self._prompt_key)

    @property
    def live(self) -> Sequence[str]:
        """The text encoders that must be loaded."""
        return self.train if self.keep else self.family.text_encoder_names

    def moments(self, picture: Picture, view: View) -> Tensor:
        """(2C, h, w), the posterior's mean and log-variance."""
        if not self.keep:
            return self.family.encode_image(view(picture.decode()))
        return self.entry(self.image_key(picture, view), picture.name)["moments"]

    def text(self, prompt: str) -> dict[str, Tensor]:
        """What `Denoiser` takes of one prompt."""
        text = {}
        for name in self.family.text_encoder_names:
            if name in self.train:
                text[f"{name}_ids"] = self.tokens(name, prompt)
            else:
                text |= self.outputs(name, prompt)
        return text

    def outputs(self, name: str, prompt: str) -> dict[str, Tensor]:
        """The outputs of one text encoder as it is now, without the batch axis."""
        if name in self.live:
            return self.family.encode_prompt(name, prompt)
        return self.entry(self.prompt_key(name, prompt), repr(prompt))

    def entry(self, key: str, name: str) -> dict[str, Tensor]:
        if (tensors := self.cache.read(key)) is None:
            raise RunFailedError(f"the cached encoding of {name} was lost or damaged during the run: start it again")
        return tensors

    def _image_key(self, picture: Picture, view: View) -> str:
        return key_of(image=picture.digest, view=asdict(view), encoder=self.family.identity("vae"))

    def _prompt_key(self, name: str, prompt: str) -> str:
        parts = [self.family.identity(part) for part in (name, tokenizer_of(name))]
        length = self.family.max_sequence_length if name == self.family.t5_encoder else None
        return key_of(prompt=prompt, encoder=parts, length=length)

    def fill(self, views: Iterable[tuple[Picture, View]], prompts: Iterable[str], accelerator: Accelerator) -> None:
        """Encode what is missing, shared among the processes, with one encoder in memory at a time."""
        family, views, prompts = self.family, list(views), list(prompts)
        work = {
            "vae": [
                (self.image_key(picture, view), partial(self.encode_view, picture, view)) for picture, view in views
            ]
        }
        for name in family.text_encoder_names:
            if name not in self.train:
                work[name] = [(self.prompt_key(name, p), partial(family.encode_prompt, name, p)) for p in prompts]
        rank, world = accelerator.process_index, accelerator.num_processes
        for own in (True, False):  # the other processes' share is missing on unshared disks only
            for part, jobs in work.items():
                share = [job for i, job in enumerate(jobs) if (i % world == rank) == own]
                if missing := {key: job for key, job in share if self.cache._read(key) is None}:
                    family.load(part)
                    for key, job in tqdm(missing.items(), f"encoding: {part}", disable=not accelerator.is_main_process):
                        self.cache.write(key, job())
                    family.release()
            accelerator.wait_for_everyone()

    def encode_view(self, picture: Picture, view: View) -> dict[str, Tensor]:
        return {"moments": self.family.encode_image(view(picture.decode()))}
