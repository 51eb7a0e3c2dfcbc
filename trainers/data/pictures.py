"""Pictures with their captions, from a folder or the `datasets` library."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from trainers.config import ConceptConfig, DataConfig
from trainers.data import decoding
from trainers.data.caption_variants import AS_WRITTEN, Wording
from trainers.data.captions import read_captions
from trainers.data.dataset_rows import open_dataset, read_encoded, read_row_captions
from trainers.data.folders import collect_image_files, kohya_repeats, list_image_files, scan_folder
from trainers.data.intake import Intake
from trainers.data.masks import find_masks
from trainers.errors import UserError

__all__ = [
    "Picture",
    "PictureFacts",
    "check_bit_depth",
    "collect_image_files",
    "keep_readable",
    "list_image_files",
    "picture_from_file",
    "pictures_from_dataset",
    "pictures_from_folder",
]

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of the values of cameras, scanners and microscopes


@dataclass(frozen=True)
class PictureFacts:
    """What one decoding of a picture tells; size: width and height in pixels, upright;
    fingerprint: of its pixels, whatever file holds them."""

    size: tuple[int, int]
    fingerprint: str
    storage: decoding.StoredAs


@dataclass(frozen=True)
class Picture:
    """One picture: its name for messages, a way to read its encoded bytes, its caption.

    bit_depth: how many bits a deep picture uses, see `decoding.decode`; repeats: how often it
    counts among the others; other_captions: of which a visit may draw one too; wording: how a
    caption becomes the text of a visit; mask: where it is learnt, see `trainers.data.masks`, a
    picture that is its own mask by its alpha channel; concept: the name of its set, if there are
    several.
    """

    name: str
    read: Callable[[], bytes]
    caption: str
    bit_depth: int | None = None
    repeats: int = 1
    other_captions: tuple[str, ...] = ()
    wording: Wording = AS_WRITTEN
    mask: Picture | None = None
    concept: str = ""

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.other_captions)

    @cached_property
    def digest(self) -> str:
        """Of what decides the pixels."""
        with self.named_errors():
            content = hashlib.sha256(self.read())
        if self.bit_depth is not None:
            content.update(f"bit depth {self.bit_depth}".encode())
        return content.hexdigest()

    @property
    def is_grayscale(self) -> bool:
        """Whether it is stored without colours."""
        return self.storage.mode in ("1", "L", "LA", "F") or self.storage.has_deep_gray

    @cached_property
    def storage(self) -> decoding.StoredAs:
        with self.named_errors():
            return decoding.read_storage(self.read())

    @cached_property
    def facts(self) -> PictureFacts:
        """Raises: UserError, as `decode`."""
        image = self.decode()
        fingerprint = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return PictureFacts(image.size, fingerprint, self.storage)

    @property
    def largest_value(self) -> int:
        """Of a picture with more than 8 bits."""
        with self.named_errors():
            return decoding.largest_value(self.read())

    def decode(self) -> Image.Image:
        """RGB, upright and in sRGB, see `decoding.decode`. Raises: UserError naming a broken
        file."""
        with self.named_errors():
            return decoding.decode(self.read(), self.bit_depth)

    @contextmanager
    def named_errors(self, kind: str = "picture") -> Iterator[None]:
        """Whatever goes wrong inside is a UserError that names the file and its kind."""
        try:
            yield
        except decoding.UnreadablePictureError as error:
            reason = str(error).replace("readable picture", f"readable {kind}")
            raise UserError(f"{self.name} {reason}") from None
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(
                f"{self.name} is not a readable {kind} ({error}): mend or remove it"
            ) from None


def picture_from_file(path: Path, caption: str = "", bit_depth: int | None = None) -> Picture:
    return Picture(str(path), partial(decoding.read_file, path), caption, bit_depth)


def pictures_from_folder(  # noqa: PLR0913 (all that the pictures of a folder depend on)
    folder: Path,
    photos: ConceptConfig,
    data: DataConfig,
    intake: Intake,
    column: str | None = None,
    wording: Wording | None = None,
) -> list[Picture]:
    """The pictures of a folder and its sub-folders with their captions, see `read_captions`.

    Without one of its own a picture has the prompt of its set, and without that the name of its
    folder, where that is one of kohya's.
    """
    contents = scan_folder(folder, data.picture_folders)
    masks = find_masks(contents, photos, intake)
    captions = read_captions(contents, column, data.caption_lines)
    # class pictures have their captions as they are
    wording = wording or Wording(trigger=photos.trigger or "")
    pictures = []
    for path in contents.pictures:
        repeats, folder_caption = kohya_repeats(path, folder)
        fallback = folder_caption if photos.instance_prompt is None else photos.instance_prompt
        own = captions.by_picture.get(path, (fallback,))
        first, *others = wording.complete_all(own, path.name)
        read, times = partial(decoding.read_file, path), repeats * photos.repeats
        texts = tuple(others), wording
        picture = Picture(str(path), read, first, data.bit_depth, times, *texts)
        if path in masks:
            picture = replace(picture, mask=picture_from_file(masks[path]))
        elif photos.use_alpha_mask:
            picture = replace(picture, mask=picture)
        pictures.append(replace(picture, concept=photos.name))
    intake.describe_folder(contents, captions, pictures)
    return check_captions(pictures)


def check_captions(pictures: list[Picture]) -> list[Picture]:
    """Raises: UserError naming pictures without a caption."""
    uncaptioned = [Path(picture.name).name for picture in pictures if picture.caption is None]
    if uncaptioned:
        more = f" and {len(uncaptioned) - 5} more" if len(uncaptioned) > 5 else ""
        raise UserError(
            f"no caption for {', '.join(uncaptioned[:5])}{more}: set data.instance_prompt, or put "
            f"a .txt beside each"
        )
    return pictures


def pictures_from_dataset(photos: ConceptConfig, data: DataConfig, intake: Intake) -> list[Picture]:
    """Each row is read when it is wanted, for such a set may be large."""
    if photos.caption_column is None and photos.instance_prompt is None:
        raise UserError("no captions: set data.caption_column or data.instance_prompt")
    name, column = photos.dataset_name, photos.image_column
    rows = open_dataset(
        name,
        photos.dataset_split,
        {"image_column": column, "caption_column": photos.caption_column},
    )
    wording, pictures, num_without = Wording.from_config(data, photos.trigger), [], 0
    for i, captions in enumerate(read_row_captions(rows, photos, data.caption_lines)):
        num_without += not captions
        own = captions or (photos.instance_prompt,)
        first, *others = wording.complete_all(own, f"{name}[{i}]")
        read, texts = partial(read_encoded, rows, i, column), (tuple(others), wording)
        picture = Picture(f"{name}[{i}]", read, first, data.bit_depth, photos.repeats, *texts)
        mask = picture if photos.use_alpha_mask else None
        pictures.append(replace(picture, mask=mask, concept=photos.name))
    intake.note(f"{len(pictures)} pictures of {Path(name).name}, split {photos.dataset_split}")
    if num_without and photos.caption_column:
        intake.warn(f"{num_without} rows have no caption: data.instance_prompt is used for them")
    return check_captions(pictures)


def keep_readable(
    pictures: list[Picture], config: DataConfig, source: str, intake: Intake
) -> list[Picture]:
    """Those that decode. Raises: UserError for the first that does not (unless skipped), or when
    none is left."""

    def decoding_error(picture: Picture) -> UserError | None:
        try:
            picture.facts  # noqa: B018
        except UserError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(decoding_error, pictures))
    for error in filter(None, errors):
        if not config.skip_corrupt:
            raise UserError(f"{error}, or set data.skip_corrupt=true")
        warnings.warn(f"skipped: {error}", stacklevel=2)
    if num_skipped := len(errors) - errors.count(None):
        intake.warn(f"{num_skipped} unreadable pictures are left out (data.skip_corrupt)")
    result = [picture for picture, error in zip(pictures, errors, strict=True) if error is None]
    if not result:
        raise UserError(
            f"{source} holds no pictures ({', '.join(sorted(decoding.IMAGE_SUFFIXES))})"
        )
    check_bit_depth(result, config.bit_depth)
    return result


def check_bit_depth(pictures: Sequence[Picture], bit_depth: int | None) -> None:
    """Raises: UserError where deep pictures use fewer bits than they would be read with, which
    would leave a few dark levels of them."""
    colors = [picture for picture in pictures if picture.storage.has_deep_colors]
    gray = [picture for picture in pictures if picture.storage.has_deep_gray]
    for group, is_told in ((colors, bit_depth == 16), (gray, bit_depth is not None)):
        if not group or is_told:
            continue
        largest = max(picture.largest_value for picture in group)
        bits = next((bits for bits in BIT_DEPTHS if largest < 2**bits), 16)
        if bits == 16:
            continue
        found = (
            f"data.bit_depth: {len(group)} pictures such as {group[0].name} have 16 bits and use "
            f"{bits} of them (the largest value is {largest})"
        )
        if group is colors:
            raise UserError(
                f"{found}; of colors the upper 8 bits are read: save them with 8 bits, or set "
                "data.bit_depth=16 if they are that dark"
            )
        raise UserError(f"{found}: set data.bit_depth={bits}, or 16 if they are that dark")
