"""A base in one file becomes a folder in the diffusers layout, once, in the user's cache.

The folder is found by the content of the file and of the settings, so it is never another's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from trainers.atomic import CACHE_VARIABLE, cache_home, replacing_folder
from trainers.config import ModelConfig
from trainers.config.family_facts import family_facts
from trainers.data.file_digests import FileDigests
from trainers.errors import RunFailedError, UserError
from trainers.original.checkpoint import (
    IDLE,
    V_PREDICTION,
    ZERO_SNR,
    Checkpoint,
    read_checkpoint,
)
from trainers.original.settings import (
    INDEX_NAME,
    UNUSED,
    find_lacking,
    find_settings,
    is_model,
    read_components,
    setting_files,
    weight_files,
)
from trainers.original.weights import write_component
from trainers.progress import track

VERSION = 2  # of what is written: another makes the folders that are there useless
CONTENTS = "contents.json"  # the bytes of each file of a folder, which is whole if it has them


def diffusers_folder(model: ModelConfig) -> Path:
    """The folder that the base `model`, one file, was converted to.

    Raises: UserError, and RunFailedError where the user's cache cannot be written.
    """
    checkpoint = open_checkpoint(model)
    settings = find_settings(model, checkpoint)
    components = read_components(settings, model)
    models = [part for part, kind in components.items() if is_model(kind)]
    lacking = [part for part in models if not checkpoint.has(part)]
    settings = find_lacking(model, checkpoint, settings, lacking)
    home = cache_home() / "bases"
    digests = FileDigests()
    digests.load(home / "files.json")
    facts = [f"{VERSION} {models}", *describe_files(checkpoint, settings, lacking, digests)]
    folder = home / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
    # a cache that nobody may write to is read all the same
    if not is_whole(folder):
        with writing_cache(home):
            home.mkdir(parents=True, exist_ok=True)
            digests.save()
            # of several processes one converts
            with FileLock(f"{folder}.converting"):
                if not is_whole(folder):
                    with replacing_folder(folder) as temporary:
                        write_folder(checkpoint, settings, components, lacking, temporary)
                        write_contents(temporary)
    digests.save()
    return folder


@contextmanager
def writing_cache(home: Path) -> Iterator[None]:
    """Raises: RunFailedError in place of the disk's errors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailedError(
            f"{home}: a base in one file is converted to a folder there, as large as the file, and "
            f"that failed ({error}). Make room or get the right to write there, or name another "
            f"folder in the environment variable {CACHE_VARIABLE}"
        ) from error


def write_contents(folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    sizes.pop(CONTENTS, None)
    (folder / CONTENTS).write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a folder has all that was written: the user, or a cleaner, may have removed some."""
    try:
        sizes = json.loads((folder / CONTENTS).read_text("utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Raises: UserError for a file of another family than the config says."""
    path = Path(model.pretrained_model_name_or_path)
    family, checkpoint = read_checkpoint(path)
    if family != model.family:
        raise UserError(
            f"model.family: {path} is a file of {family_facts(family).title}, but "
            f"model.family={model.family}: set model.family={family}, or take another file"
        )
    return checkpoint


def settings_folder(model: ModelConfig) -> Path:
    """A folder with the settings of a base in one file, without its weights. Raises: UserError."""
    return find_settings(model, open_checkpoint(model))


def describe_files(
    checkpoint: Checkpoint, settings: Path, lacking: Sequence[str], digests: FileDigests
) -> Iterator[str]:
    """Each file that the folder is made of, by its content."""
    yield digests(checkpoint.path)
    for path in sorted(setting_files(settings)):
        yield f"{path.relative_to(settings)} {digests(path)}"
    for part in lacking:
        for path in sorted(weight_files(settings / part)):
            yield f"{part}/{path.name} {digests(path)}"


def write_folder(
    checkpoint: Checkpoint,
    settings: Path,
    components: dict[str, list[str]],
    lacking: Sequence[str],
    folder: Path,
) -> None:
    """Write the pipeline. Raises: UserError where the file has other tensors than it should."""
    for path in setting_files(settings):
        if path.parent == settings or path.parent.name in components:
            target = folder / path.relative_to(settings)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    for part in lacking:
        for path in weight_files(settings / part):
            link_or_copy(path, folder / part / path.name)
    write_index(folder, components)
    adapt_scheduler(checkpoint, folder)
    used: set[str] = set()
    present = [name for name, kind in components.items() if is_model(kind) and name not in lacking]
    for component in track(present, f"converting {checkpoint.path.name}"):
        used |= write_component(checkpoint, component, components[component], folder)
    # a text encoder that the run leaves out is known all the same
    encoders = checkpoint.facts.single_file.text_encoders
    left_out = tuple(own.prefix for name, own in encoders.items() if name not in components)
    left = []
    for name, own in checkpoint.names.items():
        if name not in used and not IDLE.match(own) and not name.startswith(left_out):
            left.append(own)
    if left:
        warnings.warn(
            f"{checkpoint.path.name}: {len(left)} tensors are of no part of the pipeline and are "
            f"not used, for example {', '.join(left[:3])}",
            stacklevel=2,
        )


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, where the disk can do that."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_index(folder: Path, components: dict[str, list[str]]) -> None:
    """The pipeline's index without the parts that no training needs."""
    path = folder / INDEX_NAME
    index = json.loads(path.read_text("utf-8"))
    for name in UNUSED:
        if name in index and name not in components:
            index[name] = [None, None]
    path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def adapt_scheduler(checkpoint: Checkpoint, folder: Path) -> None:
    """Tell the scheduler what the file says of its training: that it predicts v, to pure noise."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text("utf-8"))
    if V_PREDICTION in checkpoint.tensors:
        config["prediction_type"] = "v_prediction"
    if ZERO_SNR in checkpoint.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
