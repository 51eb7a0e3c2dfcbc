"""Encoded pictures and prompts on disk, keyed by everything they depend on: an entry may be unused, but never wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .data import Picture, View
from .families import Family


class Cache:
    """Tensors by key: one safetensors file each, written aside and renamed, with a checksum of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = lru_cache(maxsize=512)(self._read)

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
    """Moments per picture and condition per distinct prompt, read from the cache, encoded by the family when missing.

    Without a cache (`keep` false) the family's encoders stay loaded and encode at each call. While the text encoder
    trains, a condition is token ids and nothing of it is cached.
    """

    def __init__(self, family: Family, folder: Path, keep: bool, train_text_encoder: bool) -> None:
        self.family, self.keep, self.train_text_encoder = family, keep, train_text_encoder
        self.cache = Cache(folder)
        self.tokens = lru_cache(maxsize=65536)(family.tokenize)

    def moments(self, picture: Picture, view: View) -> Tensor:
        """(2C, h, w), the posterior's mean and log-variance."""
        if not self.keep:
            return self.family.encode_image(view(picture.decode()))
        return self.entry(self.image_key(picture, view), picture.name)["moments"]

    def condition(self, prompt: str) -> dict[str, Tensor]:
        if self.train_text_encoder:
            return self.tokens(prompt)
        if not self.keep:
            return self.family.encode_prompt(prompt)
        return self.entry(self.prompt_key(prompt), repr(prompt))

    def entry(self, key: str, name: str) -> dict[str, Tensor]:
        if (tensors := self.cache.read(key)) is None:
            raise RuntimeError(f"the cache entry of {name} went missing or was damaged during the run: start it again")
        return tensors

    def image_key(self, picture: Picture, view: View) -> str:
        return key_of(image=picture.digest, view=asdict(view), encoder=self.family.identity("vae"))

    def prompt_key(self, prompt: str) -> str:
        return key_of(prompt=prompt, encoder=[self.family.identity(name) for name in self.family.text_parts])

    def fill(self, views: Iterable[tuple[Picture, View]], prompts: Iterable[str], accelerator: Accelerator) -> None:
        """Encode what is missing, shared among the processes; then free the encoders."""
        jobs = {self.image_key(picture, view): (picture, view) for picture, view in views}
        if not self.train_text_encoder:
            jobs |= {self.prompt_key(prompt): prompt for prompt in prompts}
        rank, world = accelerator.process_index, accelerator.num_processes
        for share in (slice(rank, None, world), slice(None)):  # the second pass finds work only on unshared disks
            missing = [(key, job) for key, job in list(jobs.items())[share] if self.cache._read(key) is None]
            if missing:
                self.family.load("vae", *self.family.text_encoder_names)
            for key, job in tqdm(missing, "encoding", disable=not accelerator.is_main_process or not missing):
                if isinstance(job, str):
                    self.cache.write(key, self.family.encode_prompt(job))
                else:
                    picture, view = job
                    self.cache.write(key, {"moments": self.family.encode_image(view(picture.decode()))})
            accelerator.wait_for_everyone()
        self.family.release()
