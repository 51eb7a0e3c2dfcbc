"""Encoded pictures and prompts on disk.

An entry's key tells everything that it depends on: an entry may be unused, but never wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers.atomic import replacing_file
from trainers.config import DreamBoothConfig
from trainers.data.caption_variants import distinct_texts
from trainers.data.crops import Crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.pictures import Picture
from trainers.errors import RunFailedError
from trainers.progress import track

Job = Callable[[], dict[str, Tensor]]  # computes an entry

MAX_KEYS = 65536  # keys, and prompts' token ids, that are remembered
MAX_ENTRIES = 512  # entries that are kept in memory


class Encoders(Protocol):
    """What the cache needs of a model family: encoders loaded by name and freed together."""

    text_encoder_names: Sequence[str]
    t5_encoder: str | None
    max_sequence_length: int

    def load(self, *names: str) -> None: ...
    def unload(self) -> None: ...
    def component_digest(self, part: str) -> str: ...
    def tokenizer_digest(self, text_encoder: str) -> str: ...
    def num_chunks(self, name: str) -> int: ...
    def tokenize(self, name: str, prompt: str) -> Tensor: ...
    def encode_prompt(self, name: str, prompt: str) -> dict[str, Tensor]: ...
    def encode_image(self, pixels: Tensor) -> Tensor: ...


class TensorCache:
    """Named tensors by key, in one safetensors file for each, with a checksum of key and content.

    A file is written under another name and then renamed, so that it is whole or absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = lru_cache(maxsize=MAX_ENTRIES)(self.read_pinned)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read_file(self, key: str) -> dict[str, Tensor] | None:
        """The entry as the file holds it now, or None if it is absent, damaged or another one."""
        path = self.path(key)
        # a pipe of that name would be waited for
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
                return tensors if entry_checksum(key, tensors) == expected else None
        except (OSError, SafetensorError):
            return None

    def read_pinned(self, key: str) -> dict[str, Tensor] | None:
        """The entry, in pinned memory if there is a GPU, so that the host need not wait for copies.

        `read` is the same and remembers the entries.
        """
        tensors = self.read_file(key)
        if tensors and torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        # other processes may be writing the same entry
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, {"sha256": entry_checksum(key, tensors)})
        # it may be remembered as absent
        self.read.cache_clear()


def entry_checksum(key: str, tensors: dict[str, Tensor]) -> str:
    """A SHA-256 of the key, for files may be exchanged, and of names, types, shapes and values."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(**facts: object) -> str:
    """A SHA-256 of what an entry depends on; the facts must be JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class CachedEncoder:
    """The moments of pictures and the outputs of text encoders, read from the cache or encoded.

    Without a cache (`use_cache` is false) the family's encoders stay loaded and encode at each
    call. Nothing is cached of the text encoders `trained_encoders`, which are given token ids.
    """

    def __init__(
        self, family: Encoders, folder: Path, use_cache: bool, trained_encoders: Sequence[str]
    ) -> None:
        self.family, self.use_cache, self.trained_encoders = family, use_cache, trained_encoders
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
            raise RunFailedError(
                f"The cached encoding of {name} was lost or damaged during the run: "
                "start the run again"
            )
        return tensors

    def compute_image_key(self, picture: Picture, crop: Crop) -> str:
        encoder = self.family.component_digest("vae")
        return cache_key(image=picture.digest, view=asdict(crop), encoder=encoder)

    def compute_prompt_key(self, name: str, prompt: str) -> str:
        parts = [self.family.component_digest(name), self.family.tokenizer_digest(name)]
        # how much the encoder reads, where it can be chosen and is
        length = self.family.max_sequence_length if name == self.family.t5_encoder else None
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
        jobs_by_encoder = self.make_jobs(list(crops), list(prompts))
        rank, world_size = accelerator.process_index, accelerator.num_processes
        # the other processes' share is missing only where disks are not shared
        for is_own in (True, False):
            for encoder, jobs in jobs_by_encoder.items():
                missing = {}
                for i, (key, job) in enumerate(jobs):
                    is_assigned = (i % world_size == rank) == is_own
                    if is_assigned and self.cache.read_file(key) is None:
                        missing[key] = job
                if missing:
                    self.encode(encoder, missing, accelerator)
            accelerator.wait_for_everyone()

    def make_jobs(
        self, crops: Sequence[tuple[Picture, Crop]], prompts: Sequence[str]
    ) -> dict[str, list[tuple[str, Job]]]:
        """The keys of all entries of each encoder, and how to compute them."""
        jobs: dict[str, list[tuple[str, Job]]] = {"vae": []}
        for picture, crop in crops:
            job = partial(self.encode_view, picture, crop)
            jobs["vae"].append((self.image_key(picture, crop), job))
        for name in self.family.text_encoder_names:
            if name not in self.trained_encoders:
                jobs[name] = []
                for prompt in prompts:
                    job = partial(self.family.encode_prompt, name, prompt)
                    jobs[name].append((self.prompt_key(name, prompt), job))
        return jobs

    def encode(self, encoder: str, jobs: dict[str, Job], accelerator: Accelerator) -> None:
        """Load an encoder, write its entries and free it."""
        self.family.load(encoder)
        is_quiet = not accelerator.is_main_process
        for key, job in track(jobs.items(), f"encoding: {encoder}", disable=is_quiet):
            self.cache.write(key, job())
        self.family.unload()

    def encode_view(self, picture: Picture, crop: Crop) -> dict[str, Tensor]:
        return {"moments": self.family.encode_image(crop(picture.decode()))}


def fill_cache(
    encoder: CachedEncoder,
    batches: Sequence[DreamBoothBatches],
    config: DreamBoothConfig,
    accelerator: Accelerator,
) -> None:
    """Encode every view of the pictures and every prompt that a run will ask for."""
    crops = [*chain(*(part.crops() for part in batches))]
    # the empty prompt stands for captions that are dropped
    prompts = [*config.validation.prompts, config.validation.negative_prompt, ""]
    texts = distinct_texts((picture for picture, _ in crops), config.seed)
    encoder.fill(crops, texts | dict.fromkeys(prompts), accelerator)
