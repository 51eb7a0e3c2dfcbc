"""What makes a folder a checkpoint: a manifest with checksums of its files and of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trainers.run_folder import MANIFEST_NAME, list_checkpoints, parse_step

Manifest = dict[str, Any]

# what a manifest must hold, and of which type
FIELDS = {"step": int, "files": dict, "facts": dict, "sha256": str}


def manifest_checksum(manifest: Manifest) -> str:
    """The SHA-256 of all else that the manifest holds."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None when it is absent, damaged or something else."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict):
        return None
    if not all(isinstance(manifest.get(name), kind) for name, kind in FIELDS.items()):
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
            files[name] = (folder / name).read_bytes()
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
