"""A base model on disk and in memory: found or downloaded, and loaded part by part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from torch import nn

from trainers.config import ModelConfig
from trainers.config.dreambooth_rules import base_problem, is_single_file
from trainers.config.family_facts import family_facts
from trainers.data.file_digests import FileDigests, part_digest, part_files
from trainers.distributed.fsdp import ShardFunction
from trainers.errors import UserError
from trainers.original.convert import diffusers_folder, settings_folder
from trainers.original.settings import read_index
from trainers.original.weights import meta_model, missing_tensors
from trainers.run_folder import BASE_DIGESTS_NAME
from trainers.tensor_file import read_header


class MemoryOptions(Protocol):
    """How a denoiser is loaded and placed so that it needs less memory, see `efficiency.apply`."""

    loads_denoiser: bool  # instead of the pipeline's own loader
    places_denoiser: bool  # on the device, whole or in parts, once it has all its layers
    shard: ShardFunction | None  # where given, each forward pass needs every process

    def load_denoiser(self, base: LoadedBase) -> nn.Module:
        """Load the denoiser of `base` in fewer bits."""

    def apply(self, base: LoadedBase) -> Any:
        """Change the loaded denoiser, and return its modulation cache if there is one."""


class PlainMemory:
    """Everything is on the device, in the base model's precision."""

    loads_denoiser = places_denoiser = False
    shard = None

    def load_denoiser(self, base: LoadedBase) -> nn.Module:
        raise NotImplementedError

    def apply(self, base: LoadedBase) -> None:
        """Do nothing."""


class LoadedBase:
    """The components of one base model; `pipe` holds those that are loaded now, if any."""

    pipeline: ClassVar[type[DiffusionPipeline]]
    denoiser_name = "transformer"

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: MemoryOptions | None = None,
    ) -> None:
        """Find or download the base model. Raises: UserError."""
        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.memory = memory or PlainMemory()
        # caches of the object, not of the class: they end with it, and its weights too
        self.meta_model = lru_cache(self.new_meta_model)
        self.component_digest = lru_cache(self.compute_digest)
        self.variant, self.folder = model.variant, find_base_model(self.pipeline, model)
        self.needs_autocast, self.file_digests = True, FileDigests()
        index = self.pipeline.load_config(self.folder)
        check_pipeline(index["_class_name"], self.pipeline, model)
        # name of a component to its library and class; absent ones have neither
        self.components: dict[str, list[str]] = {}
        for name, value in index.items():
            left_out = model.text_encoder_3 is None and name.endswith("_3")
            if isinstance(value, list) and value[0] and not left_out:
                self.components[name] = value
        encoders = [name for name in self.components if name.startswith("text_encoder")]
        self.text_encoder_names = sorted(encoders)
        for part in self.components:
            check_weight_files(self.folder / part, self.variant)
        self.pipe = self.modulation = None

    def set_autocast(self, needed: bool) -> None:
        """Say whether autocast is needed, because some layer does not know its precision."""
        self.needs_autocast = needed

    def load(self, *names: str) -> None:
        """Hold a pipeline with these components, the scheduler and the tokenizers only.

        Raises: UserError where files are broken off or missing, or lack tensors.
        """
        for name in names:
            self.check_tensors(name)
        wanted = ("scheduler", *map(tokenizer_name, self.text_encoder_names), *names)
        index = self.pipeline.load_config(self.folder)
        every_component = [part for part, value in index.items() if isinstance(value, list)]
        components = {part: None for part in every_component if part not in wanted}
        if "safety_checker" in components:
            components["requires_safety_checker"] = False
        if self.memory.loads_denoiser and self.denoiser_name in names:
            components[self.denoiser_name] = self.memory.load_denoiser(self)
        try:
            self.pipe = self.pipeline.from_pretrained(
                self.folder,
                dtype=self.dtype,
                variant=self.variant,
                use_safetensors=True,
                **components,
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.pretrained_model_name_or_path: {self.folder} cannot be loaded ({error}): "
                "fetch the base again, or set model.variant to one that it has, or to null"
            ) from error
        self.pipe.set_progress_bar_config(disable=True)
        for name in names:
            module = getattr(self.pipe, name).requires_grad_(False).eval()
            if name not in components:
                empty = [key for key, weight in module.named_parameters() if weight.is_meta]
                self.refuse_missing(name, empty)
            if name != self.denoiser_name or not self.memory.places_denoiser:
                module.to(self.device)
        if "vae" in names:
            # half precision costs quality, and the oldest autoencoder overflows in float16
            self.pipe.vae.float()

    def check_tensors(self, part: str) -> None:
        """Raises: UserError for a file of weights that is broken off, and for a text encoder that
        lacks tensors, in whose place transformers would draw random numbers."""
        found: set[str] = set()
        for path in part_files(self.folder / part, self.variant):
            if path.suffix == ".safetensors":
                found |= read_header(path).tensors.keys()
        if found and part in self.text_encoder_names:
            self.refuse_missing(part, missing_tensors(self.meta_model(part), found))

    def refuse_missing(self, part: str, names: Sequence[str]) -> None:
        """Raises: UserError where there is a name."""
        if names:
            raise UserError(
                f"model.pretrained_model_name_or_path: the weights in {self.folder / part} lack "
                f"{len(names)} tensors, for example {names[0]}: fetch the base again"
            )

    def apply_memory_options(self) -> None:
        """Change the loaded denoiser, which must have its LoRA layers, to need less memory."""
        self.modulation = self.memory.apply(self)

    def unload(self) -> None:
        """Free everything that is loaded."""
        parts = self.pipe.components.values() if self.pipe else ()
        has_weights = any(isinstance(part, nn.Module) for part in parts)
        self.pipe = self.modulation = None
        # the collector takes a third of a second, which tokenizers alone are not worth
        if has_weights:
            clear_device_cache(garbage_collection=True)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.denoiser_name)

    def new_meta_model(self, part: str) -> nn.Module:
        """A model without weights, which may be changed; `meta_model` returns a shared one."""
        return meta_model(self.folder, part, self.components[part])

    @property
    def vae_config(self) -> dict:
        """The settings of the autoencoder, with the defaults that its file leaves out."""
        return self.meta_model("vae").config

    @property
    def denoiser_config(self) -> dict:
        return self.meta_model(self.denoiser_name).config

    @property
    def vae_scale_factor(self) -> int:
        """The pixels per latent along a side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def digests(self, cache_folder: Path) -> dict[str, str]:
        """The digest of the files of each part that decides what the base computes.

        Precision and place do not count, nor do other formats beside the weights that are loaded.
        cache_folder: where the digests of files are remembered, so that they are read once.
        """
        self.file_digests.load(cache_folder / BASE_DIGESTS_NAME)
        tokenizers = map(tokenizer_name, self.text_encoder_names)
        parts = (self.denoiser_name, "vae", *self.text_encoder_names, *tokenizers, "scheduler")
        digests = {part: self.part_digest(part) for part in parts}
        self.file_digests.save()
        return digests

    def part_digest(self, part: str) -> str:
        return part_digest(self.folder / part, self.variant, self.file_digests)

    def tokenizer_digest(self, text_encoder: str) -> str:
        return self.component_digest(tokenizer_name(text_encoder))

    def compute_digest(self, part: str) -> str:
        """A digest of a component and the precision that it runs in.

        `component_digest` computes it once.
        """
        precision = "float32" if part == "vae" else self.dtype
        return hashlib.sha256(f"{precision} {self.part_digest(part)}".encode()).hexdigest()


def check_pipeline(found: str, wanted: type[DiffusionPipeline], model: ModelConfig) -> None:
    """Raises: UserError where a base is of another class than its family's."""
    name = model.pretrained_model_name_or_path
    if reason := family_facts(model.family).refused_pipelines.get(found):
        raise UserError(f"model.pretrained_model_name_or_path: {name} is {reason}")
    if found != wanted.__name__:
        raise UserError(
            f"model.family: {name} is a {found}, but model.family={model.family} requires a "
            f"{wanted.__name__}: change one of the two"
        )


def check_settings(pipeline: type[DiffusionPipeline], model: ModelConfig) -> None:
    """Raises: UserError where the settings of a base in one file are of another pipeline."""
    settings = settings_folder(model)
    found = read_index(settings).get("_class_name")
    refused = family_facts(model.family).refused_pipelines
    if found not in (pipeline.__name__, *refused):
        raise UserError(
            f"model.config: {model.config or settings} has the settings of a {found}, but "
            f"{model.pretrained_model_name_or_path} is of a {pipeline.__name__}: name a folder "
            "with those"
        )


def tokenizer_name(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def check_weight_files(folder: Path, variant: str | None) -> None:
    """Raises: UserError where a component's weights are there as pickles alone."""
    found = {"safetensors": False, "bin": False}
    for path in folder.glob("*"):
        # NAME.safetensors, NAME.VARIANT.safetensors; diffusers also takes the first for a variant
        stem, _, ending = path.name.rpartition(".")
        if ending in found and (variant or "." not in stem):
            found[ending] = True
    if found["bin"] and not found["safetensors"]:
        raise UserError(
            f"model.pretrained_model_name_or_path: the weights in {folder} are .bin files alone. "
            "Such a pickle can run programs when it is read, so it is not loaded: choose a base "
            "(or a model.variant) with safetensors, or convert it with diffusers' "
            "save_pretrained on a machine that you can spare"
        )


def find_base_model(pipeline: type[DiffusionPipeline], model: ModelConfig) -> Path:
    """The local folder of the base model, which is downloaded if need be. Raises: UserError."""
    name = model.pretrained_model_name_or_path
    if problem := base_problem(name):
        raise UserError(f"model.pretrained_model_name_or_path: {problem}")
    if is_single_file(name):
        check_settings(pipeline, model)
        return diffusers_folder(model)
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise UserError(
                f"model.pretrained_model_name_or_path: {name} has no model_index.json, so it is "
                "not a diffusers pipeline"
            )
        return Path(name)
    try:
        source = {"revision": model.revision, "variant": model.variant}
        return Path(pipeline.download(name, use_safetensors=True, **source))
    except Exception as error:
        raise UserError(
            f"model.pretrained_model_name_or_path: {name!r} cannot be downloaded from the Hub "
            f"({error}). Check the name; for a gated model accept its license on its page and log "
            "in with `hf auth login`; when offline, set a local folder"
        ) from error
