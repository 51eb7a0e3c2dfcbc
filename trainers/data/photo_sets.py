"""The pictures of a DreamBooth run: of each set to learn, those that are held out, the class's."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from trainers.config import ConceptConfig, DataConfig
from trainers.data.caption_variants import Wording
from trainers.data.folders import KOHYA_FOLDER, scan_folder
from trainers.data.intake import Intake
from trainers.data.pictures import (
    Picture,
    keep_readable,
    pictures_from_dataset,
    pictures_from_folder,
)


def load_instance_pictures(data: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """The pictures to learn, concept by concept, each decoded once as a check. Raises: UserError
    for none, broken or uncaptioned ones."""
    intake, pictures = intake or Intake(), []
    for photos in data.sets:
        with intake.about(photos.name):
            found = list_pictures(photos, data, intake)
            pictures += keep_readable(found, data, str(photos.source), intake)
    return pictures


def list_instance_pictures(data: DataConfig, intake: Intake) -> list[Picture]:
    """The pictures to learn, none of them decoded yet. Raises: UserError for uncaptioned ones."""
    pictures = []
    for photos in data.sets:
        with intake.about(photos.name):
            pictures += list_pictures(photos, data, intake)
    return pictures


def list_pictures(photos: ConceptConfig, data: DataConfig, intake: Intake) -> list[Picture]:
    """As `list_instance_pictures`, of one set."""
    if photos.dataset_name:
        return pictures_from_dataset(photos, data, intake)
    folder, column = photos.instance_data_dir, photos.caption_column
    if photos.name and photos.repeats == 1 and KOHYA_FOLDER.fullmatch(folder.name):
        intake.note(
            f"the number of {folder.name} is not read, for only sub-folders count by their names: "
            "set repeats of the concept"
        )
    wording = Wording.from_config(data, photos.trigger)
    return pictures_from_folder(folder, photos, data, intake, column, wording)


def load_held_out_pictures(data: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """Photos of the subjects that are only measured on; none where no set has such. Raises:
    UserError, as `load_instance_pictures`."""
    intake, pictures = intake or Intake(), []
    for photos in data.sets:
        folder = photos.held_out_dir
        if folder is None:
            continue
        # a folder without metadata may stand beside one that has it
        has_metadata = bool(scan_folder(folder).metadata) and not photos.dataset_name
        column = photos.caption_column if has_metadata else None
        # so that every measurement reads the same text
        wording = Wording.from_config(data, photos.trigger).unvaried
        with intake.about(photos.name):
            found = pictures_from_folder(folder, photos, data, intake, column, wording)
            pictures += keep_readable(found, data, str(folder), intake)
    return pictures


def load_class_pictures(
    folder: Path,
    photos: ConceptConfig,
    data: DataConfig,
    names: Container[str] | None = None,
    intake: Intake | None = None,
) -> list[Picture]:
    """The first `num_class_images` pictures of the class folder of a set; without captions of their
    own they have the prompt.

    names: the file names of those that may be taken, if not all.
    """
    intake = intake or Intake()
    plain = {"instance_prompt": photos.class_prompts[0], "repeats": 1}
    unmasked = {"mask_dir": None, "use_alpha_mask": False}
    with intake.about(f"class of {photos.name}" if photos.name else ""):
        pictures = pictures_from_folder(
            folder, photos.model_copy(update=plain | unmasked), data, intake
        )
        allowed = [p for p in pictures if names is None or Path(p.name).name in names]
        used = allowed[: photos.num_class_images]
        if len(pictures) > len(used):
            intake.note(
                f"of {len(pictures)} class pictures {len(used)} are used (data.num_class_images)"
            )
        return keep_readable(used, data, str(folder), intake)
