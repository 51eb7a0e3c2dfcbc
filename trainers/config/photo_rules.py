"""Rules between the keys that say where photos come from, as (path, message) of each broken one."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.config.base_rules import Errors, folder_errors
from trainers.config.caption_rules import trigger_errors
from trainers.config.dreambooth_data import DataConfig
from trainers.config.photo_sections import ConceptConfig, PhotoSet
from trainers.config.trigger import has_placeholder

# folders that a machine without the pictures does not have
FOLDER_KEYS = ("instance_data_dir", "held_out_dir", "mask_dir")


def picture_errors(data: DataConfig) -> Errors:
    """Where the pictures come from, those of the class too."""
    if data.concepts is not None:
        yield from concept_errors(data)
    for photos in data.sets:
        # not for the keys beside data.concepts, which are refused as such
        path = set_path(photos)
        yield from set_errors(path, photos)
        if data.preserves_outputs:
            yield from preservation_errors(path, photos)
        elif data.prior == "class_images":
            yield from class_errors(path, photos)
    if data.preserve_prompts and data.prior == "class_images":
        message = "has no effect without data.prior=output_preservation: set it, or remove this"
        yield "data.preserve_prompts", message
    if not data.has_masks and data.mask_floor != DataConfig.model_fields["mask_floor"].default:
        message = (
            "has no effect without masks: set data.mask_dir or data.use_alpha_mask, or remove it"
        )
        yield "data.mask_floor", message


def set_path(photos: ConceptConfig) -> str:
    """Of a set's keys in messages: the only one has those of the section itself."""
    return f"data.concepts[{photos.name}]" if photos.name else "data"


def unused_numbers(data: DataConfig) -> Iterator[str]:
    """Numbers of class pictures that a run without any was given."""
    for photos in data.sets:
        if photos.num_class_images and data.prior != "class_images":
            path = set_path(photos)
            yield (
                f"{path}.num_class_images={photos.num_class_images} has no effect: with "
                f"data.prior={data.prior} there are no class pictures"
            )


def concept_errors(data: DataConfig) -> Errors:
    """What concepts cannot be beside, and what two of them cannot have."""
    for key, known in PhotoSet.model_fields.items():
        if getattr(data, key) != known.default:
            message = "with data.concepts each concept says this for itself: move it into them"
            yield f"data.{key}", message
    names, class_folders = set(), {}
    for photos in data.sets:
        path = set_path(photos)
        # they name folders, and some disks know no case
        if photos.name.casefold() in names:
            yield f"{path}.name", "two concepts have this name: give each its own"
        names.add(photos.name.casefold())
        other = class_folders.setdefault(photos.class_data_dir, photos)
        if photos.class_data_dir and other.class_prompts != photos.class_prompts:
            message = (
                f"is the folder of {other.name} too, whose class prompt is another: give each "
                "class its own folder"
            )
            yield f"{path}.class_data_dir", message


def set_errors(path: str, photos: ConceptConfig) -> Errors:
    """path: where the keys of the set stand."""
    if photos.instance_data_dir is None and photos.dataset_name is None:
        message = f"there are no training pictures: set a folder here, or set {path}.dataset_name"
        yield f"{path}.instance_data_dir", message
    if photos.instance_data_dir is not None and photos.dataset_name is not None:
        message = (
            f"there are two sources of pictures, this and {path}.instance_data_dir: remove one of "
            "them"
        )
        yield f"{path}.dataset_name", message
    for key in FOLDER_KEYS:
        yield from folder_errors(f"{path}.{key}", getattr(photos, key))
    if photos.name:
        yield from trigger_errors(photos.trigger, f"{path}.trigger")
        prompts = [photos.instance_prompt or "", *photos.class_prompts]
        if found := next((prompt for prompt in prompts if has_placeholder(prompt)), None):
            message = f"{found!r} has a place for the trigger word: set it here, or in data.trigger"
            yield f"{path}.trigger", message
    if photos.mask_dir is not None and photos.dataset_name is not None:
        message = (
            f"files belong to the pictures of a folder: set {path}.instance_data_dir instead of "
            f"{path}.dataset_name, or {path}.use_alpha_mask where its pictures have an alpha "
            "channel"
        )
        yield f"{path}.mask_dir", message


def preservation_errors(path: str, photos: ConceptConfig) -> Errors:
    """Of a set whose class is kept without pictures of it."""
    if not photos.class_prompt:
        message = (
            "data.prior=output_preservation requires a class prompt, such as 'a photo of a dog': "
            "set it, or data.prior=class_images"
        )
        yield f"{path}.class_prompt", message
    if photos.class_data_dir is not None:
        message = (
            f"{photos.class_data_dir}, but data.prior=output_preservation uses no class pictures: "
            "remove it, or set data.prior=class_images"
        )
        yield f"{path}.class_data_dir", message


def class_errors(path: str, photos: ConceptConfig) -> Errors:
    uses_pictures = photos.num_class_images > 0
    if photos.class_data_dir is not None and not uses_pictures:
        message = (
            f"{path}.num_class_images is 0, so these class pictures would not be used: set how "
            "many to use"
        )
        yield f"{path}.class_data_dir", message
    if uses_pictures and not photos.class_prompt:
        message = f"prior preservation ({path}.num_class_images > 0) requires a class prompt"
        yield f"{path}.class_prompt", message
    if photos.class_prompt and not uses_pictures:
        message = (
            "a class prompt requires class pictures: set how many to use, for example 100, or "
            "data.prior=output_preservation, which needs none"
        )
        yield f"{path}.num_class_images", message


def is_picture_folder(path: str) -> bool:
    """Whether a key names a folder that only a machine with the pictures has."""
    return path.startswith("data.") and path.rpartition(".")[2] in FOLDER_KEYS
