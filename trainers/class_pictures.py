"""Pictures of the class, which the base draws where the user has too few, and what they are of.

A folder may be shared by several runs. Pictures that were drawn from the same prompts, base files
and settings are a set, noted in a file beside them; a run uses its own set and what no set has.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainers.atomic import aside, write_atomic
from trainers.config import ConceptConfig, DreamBoothConfig
from trainers.data import photo_checks
from trainers.data.buckets import Size, share_out
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import write_picture
from trainers.data.intake import Intake
from trainers.data.known_values import values_checksum
from trainers.data.photo_sets import load_class_pictures
from trainers.data.pictures import Picture, list_image_files
from trainers.distributed.collectives import own_items
from trainers.families.sampling import sample_picture
from trainers.progress import track
from trainers.run_folder import CLASS_PICTURES

# the number of a picture and, but in the first set of a folder, the digest of its set
PICTURE = re.compile(r"class-([0-9]{5,})(-[0-9a-f]{8})?\.png")
DRAWN_FROM = "drawn_from"  # the key of a set's file


@dataclass(frozen=True)
class Drawing:
    """What a class picture shows, and its size."""

    prompt: str
    size: Size


def prepare_class_pictures(
    encoder: CachedEncoder,
    sizes: Mapping[str, Mapping[Size, int]],
    config: DreamBoothConfig,
    accelerator: Accelerator,
    intake: Intake,
) -> list[Picture]:
    """The class pictures of a run: those of the user's own in its folders, and drawn ones.

    sizes: by concept those of the drawn pictures, in this proportion; intake: is told what is
    found in the folders, and reports it.
    """
    data, names_by_set = config.data, {}
    drawings: dict[Path, Drawing] = {}
    for photos, names in data.class_sets:
        counts = sum((Counter(sizes[name]) for name in names), Counter())
        own, drawn = choose_files(encoder, (photos, counts), config, accelerator)
        names_by_set[photos.name] = {*own, *(path.name for path in drawn)}
        drawings |= drawn
    pending = {path: drawing for path, drawing in drawings.items() if not path.exists()}
    draw_pictures(encoder, config, pending, accelerator)
    for path, drawing in drawings.items():
        if not path.with_suffix(".txt").exists():
            write_atomic(path.with_suffix(".txt"), drawing.prompt)
    pictures = []
    for photos, _ in data.class_sets:
        folder, names = class_folder(photos, config), names_by_set[photos.name]
        pictures += load_class_pictures(folder, photos, data, names, intake)
    photo_checks.report(intake, encoder.family, pictures, config, accelerator)
    return pictures


def class_folder(photos: ConceptConfig, config: DreamBoothConfig) -> Path:
    """Where the class pictures of a set are: of each concept apart, unless the user says where."""
    return photos.class_data_dir or config.output_dir / CLASS_PICTURES / photos.name


def choose_files(
    encoder: CachedEncoder,
    wanted: tuple[ConceptConfig, Mapping[Size, int]],
    config: DreamBoothConfig,
    accelerator: Accelerator,
) -> tuple[list[str], dict[Path, Drawing]]:
    """The user's own pictures in the folder of a set, by name, and those that are drawn.

    wanted: the set, and the proportion of sizes.
    """
    photos, sizes = wanted
    folder, number = class_folder(photos, config), photos.num_class_images
    own, others = [], []
    for path in list_image_files(folder):
        (others if is_drawn(path) else own).append(path.name)
    drawings: dict[Path, Drawing] = {}
    for size, count in share_out(max(number - len(own), 0), sizes).items():
        ending = claim_names(folder, drawn_from(encoder, photos, config, size))
        for path in (folder / f"class-{i:05d}{ending}.png" for i in range(count)):
            drawings[path] = Drawing(picture_prompt(path, photos), size)
    own_used = own[:number]
    num_unused = len(set(others) - {path.name for path in drawings})
    if own or num_unused:
        accelerator.print(
            f"class pictures in {folder}: {len(own_used)} of your own and {len(drawings)} drawn by "
            f"the base; {num_unused} more were drawn for other runs and are not used"
        )
    return own_used, drawings


def drawn_from(
    encoder: CachedEncoder, photos: ConceptConfig, config: DreamBoothConfig, size: Size
) -> dict[str, Any]:
    """All that decides what class pictures look like; the noise follows from their numbers."""
    family, validation = encoder.family, config.validation
    chunks = {"clip_chunks": config.model.clip_chunks} if config.model.clip_chunks > 1 else {}
    return chunks | {
        "prompts": photos.class_prompts,
        "negative_prompt": validation.negative_prompt,
        "resolution": size[0] if size[0] == size[1] else list(size),
        "num_inference_steps": validation.num_inference_steps,
        "guidance_scale": validation.guidance_scale,
        "seed": "the number of the picture",
        "quantization": config.model.quantization,
        "max_sequence_length": family.max_sequence_length,
        "base_files": family.digests(encoder.cache.folder),
    }


def set_file(folder: Path, ending: str) -> Path:
    return folder / f"class-pictures{ending}.json"


def read_set(folder: Path, ending: str) -> dict[str, Any] | None:
    """What a set of pictures was drawn from; None when there is no such set."""
    try:
        content = json.loads(set_file(folder, ending).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content.get(DRAWN_FROM) if isinstance(content, dict) else None


def is_drawn(path: Path) -> bool:
    """Whether a picture belongs to a set; all others are the user's own."""
    match = PICTURE.fullmatch(path.name)
    return bool(match) and read_set(path.parent, match[2] or "") is not None


def claim_names(folder: Path, facts: dict[str, Any]) -> str:
    """Note what pictures are drawn from; returns what follows the numbers in their names.

    That is nothing for the first set in a folder, unless pictures of the user's have such names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({DRAWN_FROM: facts}, indent=2) + "\n"
    is_free = not any(PICTURE.fullmatch(path.name) for path in list_image_files(folder))
    if is_free:
        create(set_file(folder, ""), text)
    if read_set(folder, "") == facts:
        return ""
    digest = values_checksum(facts)
    ending = f"-{digest[:8]}"
    write_atomic(set_file(folder, ending), text)
    return ending


def create(path: Path, text: str) -> None:
    """Write a file, whole or not at all, unless it is there: of two runs one is the first."""
    temporary = aside(path)
    temporary.write_text(text, "utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        # a disk without links
        if not path.exists():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def picture_prompt(path: Path, photos: ConceptConfig) -> str:
    """The prompt of a drawn picture: several take turns."""
    prompts = photos.class_prompts
    return prompts[picture_number(path) % len(prompts)]


def picture_number(path: Path) -> int:
    return int(PICTURE.fullmatch(path.name)[1])


def draw_pictures(
    encoder: CachedEncoder,
    config: DreamBoothConfig,
    pending: Mapping[Path, Drawing],
    accelerator: Accelerator,
) -> None:
    """Draw the pictures that are missing, each as it is meant, shared among the processes.

    Picture i of a set has its own noise and prompt, whoever draws it.
    """
    if pending and config.data.cache:
        prompts = [*config.data.class_prompts, config.validation.negative_prompt]
        encoder.fill([], prompts, accelerator)
    accelerator.wait_for_everyone()
    # first each process's own share, then what it does not see, where disks are not shared
    for assigned in (own_items([*pending], accelerator), pending):
        # no dictionary: a path may come twice, so that each process draws as many
        missing = [(path, pending[path]) for path in assigned if not path.exists()]
        if missing:
            draw(encoder, config, missing, accelerator)
        accelerator.wait_for_everyone()


def draw(
    encoder: CachedEncoder,
    config: DreamBoothConfig,
    missing: Sequence[tuple[Path, Drawing]],
    accelerator: Accelerator,
) -> None:
    """Load the pipeline, write class pictures, and unload it."""
    family = encoder.family
    family.load("vae", family.denoiser_name, *encoder.loaded_encoders)
    family.apply_memory_options()
    is_quiet = not accelerator.is_main_process
    for path, drawing in track(missing, "class pictures", disable=is_quiet):
        settings = config.validation, picture_number(path), drawing.size, encoder.encoder_outputs
        picture = sample_picture(family, drawing.prompt, *settings)
        # another run with the same set may have been faster, and may be reading its picture
        if not path.exists():
            write_picture(picture, path)
    family.unload()
