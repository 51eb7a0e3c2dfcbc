"""What is known of each model family without loading it, from `trainers/families/NAME.yaml`.

It is read before torch is imported, so that a config is checked in less than a second.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainers.config.base_sections import field
from trainers.config.yaml_text import parse_yaml
from trainers.errors import UserError

FOLDER = Path(__file__).parent.parent / "families"


class Facts(BaseModel):
    """A part of a facts file: an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextEncoderFacts(Facts):
    """One text encoder of the pipeline, under the pipeline's own name for it."""

    # whether LoRA can train it, which takes programs that load such a file
    lora: bool = False
    # how many it reads unless the config says otherwise; None: its tokenizer's number
    tokens: int | None = Field(None, ge=1, le=512)
    # its last layers that the denoiser is given nothing of, and that so have nothing to learn
    unread_layers: int = Field(0, ge=0)


class KohyaBlock(Facts):
    """Layers as a model's first release names them, and diffusers' layers that are their rows."""

    release: str = ""  # what the release's names begin with; {} is the number of a block
    diffusers: str = ""  # what the diffusers names begin with
    # the rest of a release's name: the rest of one or several diffusers names
    layers: dict[str, str]

    def rows(self) -> dict[str, list[str]]:
        """Each full name, and the full names of the diffusers layers that are its rows."""
        rows = {}
        for name, parts in self.layers.items():
            rows[self.release + name] = [self.diffusers + part for part in parts.split()]
        return rows


class KohyaFacts(Facts):
    """How sd-scripts, A1111 and ComfyUI name a family's layers in their LoRA files."""

    prefixes: dict[str, str]  # component of the pipeline: what its layers' names begin with
    # whether such a file is written when the config says nothing, since readers need it
    by_default: bool = False
    # whether the U-Net's blocks are numbered through, as in Stability's code
    released_unet: bool = False
    base_model_version: str  # sd-scripts' ss_base_model_version
    network_module: str  # sd-scripts' ss_network_module
    blocks: list[KohyaBlock] = []  # layers that do not lie there have one name in both
    # layers whose scale and shift diffusers has in the other order; {last}: the last block
    swapped_halves: list[str] = []

    @property
    def denoiser(self) -> str:
        """The component whose layers have the release's names; it is the first of the prefixes."""
        return next(iter(self.prefixes))


class OriginalTextFacts(Facts):
    """Where a text encoder is in a model that is one file."""

    prefix: str  # what the names of its tensors begin with
    open_clip: bool = False  # whether they are OpenCLIP's names, and not those of transformers


class SingleFileFacts(Facts):
    """A model of the family in one file, as it was released first and other programs load it."""

    mark: str  # a tensor of the denoiser that the files of no other family have
    denoiser: str = "model.diffusion_model."  # what the names of its tensors begin with
    vae: str = "first_stage_model."
    text_encoders: dict[str, OriginalTextFacts]
    tensors: list[KohyaBlock] = []  # full names of tensors that are no layer's weight or bias
    # a part of a tensor's name: the repository whose settings such a file needs; the first counts
    settings: dict[str, str]


class FamilyFacts(Facts):
    """All of a family's facts file."""

    title: str  # as people call it
    pixel_multiple: int = Field(ge=1, le=256)  # sides of pictures are multiples of it
    text_encoders: dict[str, TextEncoderFacts]
    # the denoiser's lists of blocks: what is quantized, and where LoRA presets look for layers
    blocks: list[str]
    lora_targets: dict[str, list[str]]  # a preset's name: endings of layers' names
    # section: keys that this family understands and not every family does
    config_keys: dict[str, list[str]]
    # "section.key=value" that this family cannot train with: why, and what to do
    refused: dict[str, str] = {}
    # pipelines of other models that are taken for this family: what they are, and what to do
    refused_pipelines: dict[str, str] = {}
    # diffusers' classes of norms that depend on time and prompt alone: `model.modulation_cache`
    adaptive_norms: list[str] = []
    # modelspec's ids of the base models: the settings of the denoiser that tell one from others
    architecture: dict[str, dict[str, str | int | bool | None]]
    default_base: str = ""  # what a config that names no model trains; one family has it
    licenses: dict[str, str]  # the beginning of a base's name on the Hub: its license
    readers: str = ""  # which programs besides ComfyUI read the kohya file
    kohya: KohyaFacts
    single_file: SingleFileFacts | None = None
    # the names that XLabs' trainer gives to layers, beside those of the release
    xlabs: list[KohyaBlock] = []
    widths: dict[int, str] = {}  # of the denoiser: which base models of the family have it
    telling_names: str = ""  # a regex of layers' names that no other family has
    names_elsewhere: list[str] = []  # what other trainers' configs call it, in lower case

    def is_in_block(self, layer: str) -> bool:
        """Whether a layer of the denoiser, by its full name, lies in one of its blocks."""
        return layer.startswith(tuple(f"{block}." for block in self.blocks))


@cache
def family_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def family_facts(name: str) -> FamilyFacts:
    return read_facts(FOLDER / f"{name}.yaml")


def read_facts(path: Path) -> FamilyFacts:
    """Raises: UserError that names the file and every wrong key."""
    try:
        return FamilyFacts.model_validate(parse_yaml(path.read_bytes()))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            lines.append(f"{path}: {key}: {problem['msg']}")
        raise UserError("\n".join(lines)) from None


@cache
def default_family() -> str:
    return next(name for name in family_names() if family_facts(name).default_base)


def families_with(section: str, key: str) -> list[str]:
    """The families that understand a key which not every family does; none if it is for all."""
    names = family_names()
    return [name for name in names if key in family_facts(name).config_keys.get(section, ())]


def family_named(name: object) -> str | None:
    """The family that another trainer's config calls so; None if none is."""
    wanted = str(name).strip().lower()
    for family in family_names():
        if wanted in (family, *family_facts(family).names_elsewhere):
            return family
    return None


def family_field(section: str, key: str, default: Any, help: str, **limits: Any) -> Any:
    """A key that only some families understand; the help names them."""
    titles = ", ".join(family_facts(name).title for name in families_with(section, key))
    return field(default, f"{titles}: {help}", **limits)
