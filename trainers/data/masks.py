"""Masks of photos: where a picture is learnt, and how much the rest of it counts.

A mask is a gray picture, white where its picture is learnt; grays between count in part. It is a
file of its own, or the alpha channel of its picture, which is then its own mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from trainers.config import PhotoSet
from trainers.data.captions import PictureIndex
from trainers.data.decoding import SIDEWAYS, TURNS, open_image, storage_of, to_8_bits
from trainers.data.folders import FolderContents, relative_name, scan_folder
from trainers.errors import UserError, name_some

if TYPE_CHECKING:
    from trainers.data.crops import Crop
    from trainers.data.intake import Intake
    from trainers.data.pictures import Picture

# what may follow the name of its picture in the name of a mask: OneTrainer's, and a common one
MASK_ENDINGS = ("-masklabel", "_mask")
COLOR_TOLERANCE = 8  # of 255 between the channels of a gray picture that was saved as JPEG
SHAPE_TOLERANCE = 0.02  # of the ratio of the sides, from which a mask would be squeezed
DARKEST = 128  # of 255: a mask that is nowhere brighter was not meant so


@dataclass(frozen=True)
class MaskFacts:
    """size: upright, before it is fitted to its picture's; lowest, highest: of its values."""

    size: tuple[int, int]
    lowest: int
    highest: int


def find_masks(contents: FolderContents, photos: PhotoSet, intake: Intake) -> dict[Path, Path]:
    """The mask of each picture of a folder that has a file; such files are no pictures then.

    A mask has its picture's name within its folder, with one of `MASK_ENDINGS` or without. Where
    `mask_dir` is the folder of the pictures, masks lie beside them and need the ending, those of
    held-out pictures too. Raises: UserError for two masks of one picture.
    """
    folders = [path for path in (photos.instance_data_dir, photos.held_out_dir) if path is not None]
    if photos.mask_dir is None:
        warn_of_masks(contents, intake)
        return {}
    if any(photos.mask_dir.resolve() == path.resolve() for path in folders):
        found = contents
        files = [path for path in contents.pictures if has_mask_ending(path)]
        beside = set(files)
        contents.masks = files
        contents.pictures = [path for path in contents.pictures if path not in beside]
    else:
        found = scan_folder(photos.mask_dir)
        files = found.pictures
        not_read = [*found.unused, *found.sidecars, *found.metadata]
        intake.describe_unused(FolderContents(found.root, unused=not_read))
    index = PictureIndex(contents)
    others = [PictureIndex(scan_folder(path)) for path in folders if path != contents.root]
    return match_masks(files, found.root, index, others, intake)


def match_masks(
    files: Sequence[Path],
    root: Path,
    index: PictureIndex,
    others: Sequence[PictureIndex],
    intake: Intake,
) -> dict[Path, Path]:
    """others: pictures whose masks may lie here too. Raises: as `find_masks`."""
    masks: dict[Path, Path] = {}
    unmatched = []
    for path in files:
        stem = relative_name(path.with_suffix(""), root)
        owners = owners_of(stem, index)
        if not owners and not any(owners_of(stem, other) for other in others):
            unmatched.append(relative_name(path, root))
        for owner in owners:
            if owner in masks:
                both = f"{masks[owner].name} and {path.name}"
                error = UserError(f"{owner} has two masks, {both}: remove one of them")
                intake.fail(error, [str(path)])
            masks[owner] = path
    if unmatched:
        intake.warn(f"masks without a picture of that name: {name_some(unmatched)}")
    return masks


def owners_of(stem: str, index: PictureIndex) -> list[Path]:
    """The pictures that a mask of this name belongs to: of its whole name first."""
    return index.with_stem(stem) or index.with_stem(without_ending(stem))


def without_ending(stem: str) -> str:
    """Names are compared without regard to case, and so is the ending."""
    ending = next((ending for ending in MASK_ENDINGS if stem.lower().endswith(ending)), "")
    return stem[: len(stem) - len(ending)]


def has_mask_ending(path: Path) -> bool:
    return path.stem.lower().endswith(MASK_ENDINGS)


def warn_of_masks(contents: FolderContents, intake: Intake) -> None:
    """Name pictures that look like the masks of others, where no masks are asked for."""
    alike = [relative_name(path, contents.root) for path in named_as_masks(contents)]
    if alike:
        intake.warn(
            f"named like the masks of other pictures, and learnt as pictures: {name_some(alike)}; "
            "name their folder by mask_dir, or rename them"
        )


def named_as_masks(contents: FolderContents) -> list[Path]:
    """Pictures that have the name of another one and an ending of masks."""
    index, alike = PictureIndex(contents), []
    for path in filter(has_mask_ending, contents.pictures):
        name = relative_name(path, contents.root)
        if index.with_stem(without_ending(name[: len(name) - len(path.suffix)])):
            alike.append(path)
    return alike


def decode_mask(picture: Picture) -> Image.Image:
    """The mask of a picture that has one: mode L, upright, in the picture's own size.

    Raises: UserError for one that cannot be read, is in color, or may lie either way.
    """
    mask = read_mask(picture)
    size = upright_size(picture)
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)


def read_mask(picture: Picture) -> Image.Image:
    """As `decode_mask`, in the size that the mask has."""
    file = picture.mask
    data = file.read_unchanged()
    with file.named_errors("mask"), open_image(data) as opened:
        storage = storage_of(opened)
        image = ImageOps.exif_transpose(opened)
        if file.name == picture.name:
            return alpha_channel(image)
        if storage.has_deep_gray:
            image = to_8_bits(image, 16, storage.lowest_is_white)
        gray = gray_channel(image)
    if gray is None:
        raise UserError(
            f"{file.name} is in color: a mask is gray, white where {Path(picture.name).name} is "
            "learnt and black where it is not"
        )
    return turn_alike(gray, file, picture)


def alpha_channel(image: Image.Image) -> Image.Image:
    """Mode L; white where a picture has none."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def gray_channel(image: Image.Image) -> Image.Image | None:
    """Mode L, black where it is transparent; None for a picture in color."""
    alpha = alpha_channel(image)
    channels = np.asarray(image.convert("RGB")).astype(np.int16)
    if (channels.max(-1) - channels.min(-1)).max() > COLOR_TOLERANCE:
        return None
    return ImageChops.multiply(image.convert("RGB").convert("L"), alpha)


def upright_size(picture: Picture) -> tuple[int, int]:
    stored = picture.storage
    return stored.size[::-1] if stored.orientation in SIDEWAYS else stored.size


def turn_alike(target: Image.Image, target_file: Picture, picture: Picture) -> Image.Image:
    """The decoded target as its picture lies, where that alone has an EXIF tag that turns it.

    Its size tells whether it was made for the stored picture or for the upright one. Raises:
    UserError where it does not.
    """
    stored = picture.storage
    if stored.orientation not in TURNS or target_file.storage.orientation != 1:
        return target
    if stored.size[0] == stored.size[1] or stored.orientation not in SIDEWAYS:
        raise UserError(
            f"{picture.name} is turned by its EXIF tag, and {target_file.name} has no such tag and "
            "the same size either way: save the picture upright, without the tag"
        )
    return target.transpose(TURNS[stored.orientation]) if target.size == stored.size else target


def latent_mask(picture: Picture, crop: Crop, height: int, width: int) -> Tensor:
    """(1, h, w) in 0..1: the mask as its picture is cropped and flipped, in the size of latents by
    area mean; ones for a picture without one."""
    if picture.mask is None:
        return torch.ones(1, height, width)
    # other kernels would ring, and show a little of what a mask leaves out
    shown = crop.cut(decode_mask(picture), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(shown)).float() / 255
    return F.adaptive_avg_pool2d(pixels[None], (height, width))


def check_masks(intake: Intake, pictures: Sequence[Picture], floor: float) -> None:
    """Note what is unusual about the masks of pictures that are learnt. Raises: as
    `decode_mask`."""
    masked = [picture for picture in pictures if picture.mask is not None]
    if not masked:
        return
    with ThreadPoolExecutor(4) as pool:
        found_facts = [*pool.map(mask_facts, masked)]
    facts: dict[Picture, MaskFacts] = {}
    for picture, found in zip(masked, found_facts, strict=True):
        if isinstance(found, UserError):
            intake.fail(found, [picture.mask.name])
        else:
            facts[picture] = found
    intake.note(
        f"{len(masked)} of {len(pictures)} pictures have a mask; what it leaves out counts "
        f"{floor:g} (data.mask_floor), and the loss of a picture is a mean by these weights"
    )
    lacking = [picture for picture in pictures if picture.mask is None]
    dark = [p for p, found in facts.items() if found.highest < DARKEST]
    white = [p for p, found in facts.items() if found.lowest == 255]
    sized = [p for p, found in facts.items() if found.size != upright_size(p)]
    squeezed = [p for p in sized if shape_difference(facts[p].size, upright_size(p))]
    for group, text in (
        (lacking, "pictures without a mask, which count everywhere"),
        (dark, "masks that show nothing (white, 255, is what is learnt)"),
        (white, "masks that are white everywhere, as if there were none"),
        ([p for p in sized if p not in squeezed], "masks of another size than their picture"),
        (squeezed, "masks of another shape than their picture, which are squeezed to fit"),
    ):
        if group:
            intake.warn(f"{text}: {name_some([mask_name(picture) for picture in group])}")


def mask_name(picture: Picture) -> str:
    """Of a mask, or of a picture without one."""
    name = Path((picture.mask or picture).name).name
    return f"{picture.concept}: {name}" if picture.concept else name


def mask_facts(picture: Picture) -> MaskFacts | UserError:
    try:
        mask = read_mask(picture)
    except UserError as error:
        return error
    return MaskFacts(mask.size, *mask.getextrema())


def shape_difference(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes differ in the ratio of their sides."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) > SHAPE_TOLERANCE
