"""What makes a folder a checkpoint: a manifest with checksums of its files and of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from trainers.atomic import read_ordinary_file
from trainers.data.known_values import values_checksum
from trainers.run_folder import MANIFEST_NAME, list_checkpoints, parse_step

Manifest = dict[str, Any]

# of a file beside the manifest, never elsewhere
FileName = Annotated[str, Field(pattern=r"^\w[\w.\-]*$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class PoolForm(TypedDict, total=False):
    """Of the facts of a pool of pictures; files: by name, digests of content and caption."""

    count: Count
    digest: str
    files: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]


class ExtensionForm(TypedDict):
    """How a run went on beyond its own plan; before: None where no number was planned."""

    from_step: Count
    max_train_steps: Count
    before: Count | None
    end: str


class BestForm(TypedDict):
    """The validations so far, see `best_weights.BestSoFar`."""

    step: Count
    value: float | None
    mark: float | None
    waited: Count


# of the config the one value that is compared by more than equality
ConfigForm = TypedDict("ConfigForm", {"train.max_train_steps": Count}, total=False)
ConfigForm.__pydantic_config__ = ConfigDict(extra="allow")

# earlier versions had more facts, or fewer, and the config's beside the others
FactsForm = TypedDict(
    "FactsForm",
    {
        "pictures": dict[str, PoolForm],
        "base": dict[str, str],
        "initial LoRA": str | None,
        "config": ConfigForm,
        "train.max_train_steps": Count,
        "mixed precision": str,
        "global batch": Count,
    },
    total=False,
)
FactsForm.__pydantic_config__ = ConfigDict(extra="allow")


class ManifestForm(TypedDict):
    """What a manifest must hold, and of which type; others of its values are not looked at."""

    step: Count
    rollbacks: NotRequired[Annotated[int, Field(ge=0, le=64)]]
    end: NotRequired[str]
    extensions: NotRequired[list[ExtensionForm]]
    best: NotRequired[BestForm]
    files: dict[FileName, str]
    facts: FactsForm
    scaler: dict[str, Any] | None
    sha256: str


ManifestForm.__pydantic_config__ = ConfigDict(extra="allow", strict=True)
MANIFEST_FORM = TypeAdapter(ManifestForm)


def manifest_checksum(manifest: Manifest) -> str:
    """The SHA-256 of all else that the manifest holds."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return values_checksum(content)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None when it is absent, damaged or something else."""
    try:
        manifest = json.loads(read_ordinary_file(folder / MANIFEST_NAME))
        MANIFEST_FORM.validate_python(manifest)
    except (OSError, ValueError, RecursionError, ValidationError):
        return None
    return manifest if manifest["sha256"] == manifest_checksum(manifest) else None


def read_checkpoint(folder: Path) -> tuple[Manifest, dict[str, bytes]] | None:
    """Manifest and files of a checkpoint, or None when it is incomplete or damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    files = {}
    for name, digest in manifest["files"].items():
        try:
            files[name] = read_ordinary_file(folder / name)
        except OSError:
            return None
        if hashlib.sha256(files[name]).hexdigest() != digest:
            return None
    return manifest, files


def is_own_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the step in its name, with all of its files.

    Their contents are not read.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest["step"] != parse_step(folder.name) or folder.is_symlink():
        return False
    return all((folder / name).is_file() for name in manifest["files"])


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder that are complete, newest first."""
    return [folder for folder in list_checkpoints(root) if is_own_checkpoint(folder)]
