"""Pictures with their captions, from a folder or the `datasets` library."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from trainers.config import DataConfig
from trainers.data import decoding
from trainers.data.captions import read_captions
from trainers.data.dataset_rows import open_dataset, read_encoded
from trainers.data.folders import collect_image_files, kohya_repeats, list_image_files, scan_folder
from trainers.data.intake import Intake
from trainers.data.picture_memory import KnownPicture, PictureFacts
from trainers.errors import UserError

__all__ = [
    "Picture",
    "PictureFacts",
    "check_bit_depth",
    "collect_image_files",
    "list_image_files",
    "load_class_pictures",
    "load_held_out_pictures",
    "load_instance_pictures",
    "picture_from_file",
]

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of the values of cameras, scanners and microscopes


@dataclass(frozen=True)
class Picture:
    """One picture: its name for messages, a way to read its encoded bytes, its caption.

    bit_depth: how many bits a deep picture uses, see `decoding.decode`; repeats: how often it
    counts among the others; file: what `read` reads, if it is an ordinary file; known: what was
    found out before.
    """

    name: str
    read: Callable[[], bytes]
    caption: str
    bit_depth: int | None = None
    repeats: int = 1
    file: Path | None = None
    known: KnownPicture | None = field(default=None, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """Of what decides the pixels."""
        return self.known.digest if self.known else self.content_digest(self.read_named())

    def content_digest(self, data: bytes) -> str:
        """The digest of a picture of these bytes."""
        content = hashlib.sha256(data)
        if self.bit_depth is not None:
            content.update(f"bit depth {self.bit_depth}".encode())
        return content.hexdigest()

    def read_named(self) -> bytes:
        with self.named_errors():
            return self.read()

    @property
    def is_grayscale(self) -> bool:
        """Whether it is stored without colours."""
        return self.storage.mode in ("1", "L", "LA", "F") or self.storage.has_deep_gray

    @cached_property
    def storage(self) -> decoding.StoredAs:
        if self.known:
            return self.known.facts.storage
        with self.named_errors():
            return decoding.read_storage(self.read())

    @cached_property
    def facts(self) -> PictureFacts:
        """Raises: UserError, as `decode`."""
        return self.known.facts if self.known else self.examine(self.read_named())

    def examine(self, data: bytes) -> PictureFacts:
        """The facts of a picture of these bytes. Raises: UserError, as `decode`."""
        with self.named_errors():
            image, storage = decoding.decode(data, self.bit_depth), decoding.read_storage(data)
        fingerprint = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return PictureFacts(image.size, fingerprint, storage)

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
    read = partial(decoding.read_file, path)
    return Picture(str(path), read, caption, bit_depth, file=path)


def load_instance_pictures(config: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """The pictures to learn, each decoded once as a check. Raises: UserError for none, broken or
    uncaptioned ones."""
    intake = intake or Intake()
    if config.dataset_name:
        pictures, source = pictures_from_dataset(config, intake), config.dataset_name
    else:
        folder, column = config.instance_data_dir, config.caption_column
        pictures = pictures_from_folder(folder, config, config.instance_prompt, intake, column)
        source = str(folder)
    return keep_readable(pictures, config, source, intake)


def load_held_out_pictures(config: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """Photos of the subject that are only measured on. Raises: UserError, as
    `load_instance_pictures`."""
    folder = config.held_out_dir
    # a folder without metadata may stand beside one that has it
    has_metadata = bool(scan_folder(folder).metadata) and not config.dataset_name
    column = config.caption_column if has_metadata else None
    intake = intake or Intake()
    pictures = pictures_from_folder(folder, config, config.instance_prompt, intake, column)
    return keep_readable(pictures, config, str(folder), intake)


def load_class_pictures(
    folder: Path,
    config: DataConfig,
    names: Container[str] | None = None,
    intake: Intake | None = None,
) -> list[Picture]:
    """The first `num_class_images` pictures of the class folder; without captions of their own they
    have the prompt.

    names: the file names of those that may be taken, if not all.
    """
    intake = intake or Intake()
    pictures = pictures_from_folder(folder, config, config.class_prompts[0], intake)
    allowed = [p for p in pictures if names is None or Path(p.name).name in names]
    used = allowed[: config.num_class_images]
    if len(pictures) > len(used):
        intake.note(
            f"of {len(pictures)} class pictures {len(used)} are used (data.num_class_images)"
        )
    return keep_readable(used, config, str(folder), intake)


def pictures_from_folder(
    folder: Path,
    config: DataConfig,
    prompt: str | None,
    intake: Intake,
    column: str | None = None,
) -> list[Picture]:
    """The pictures of a folder and its sub-folders with their captions, see `read_captions`.

    Without one of its own a picture has `prompt`, and without that the name of its folder, where
    that is one of kohya's.
    """
    others = (config.instance_data_dir, config.held_out_dir, config.class_data_dir)
    contents = scan_folder(folder, others)
    captions = read_captions(contents, column)
    pictures = []
    for path in contents.pictures:
        repeats, folder_caption = kohya_repeats(path, folder)
        fallback = folder_caption if prompt is None else prompt
        caption = captions.by_picture.get(path, fallback)
        read = partial(decoding.read_file, path)
        pictures.append(Picture(str(path), read, caption, config.bit_depth, repeats, path))
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


def pictures_from_dataset(config: DataConfig, intake: Intake) -> list[Picture]:
    """Each row is read when it is wanted, for such a set may be large."""
    if config.caption_column is None and config.instance_prompt is None:
        raise UserError("no captions: set data.caption_column or data.instance_prompt")
    name, column = config.dataset_name, config.image_column
    rows = open_dataset(
        name,
        config.dataset_split,
        {"image_column": column, "caption_column": config.caption_column},
    )
    captions = rows[config.caption_column] if config.caption_column else [None] * len(rows)
    pictures, num_without = [], 0
    for i, caption in enumerate(captions):
        if caption is not None and not isinstance(caption, str):
            raise UserError(
                f"data.caption_column: {name}[{i}] has {caption!r} in {config.caption_column!r}, "
                "which is not text"
            )
        if not (caption or "").strip():
            caption = config.instance_prompt
            num_without += 1
        read = partial(read_encoded, rows, i, column)
        pictures.append(Picture(f"{name}[{i}]", read, caption, config.bit_depth))
    intake.note(f"{len(pictures)} pictures of {Path(name).name}, split {config.dataset_split}")
    if num_without and config.caption_column:
        intake.warn(f"{num_without} rows have no caption: data.instance_prompt is used for them")
    return check_captions(pictures)


def keep_readable(
    pictures: list[Picture], config: DataConfig, source: str, intake: Intake
) -> list[Picture]:
    """Those that decode, with what is known of them. Raises: UserError for the first that does not
    (unless skipped), or when none is left."""

    def examine(picture: Picture) -> Picture | UserError:
        try:
            return intake.memory.examine(picture)
        except UserError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        examined = list(pool.map(examine, pictures))
    result = [picture for picture in examined if isinstance(picture, Picture)]
    for error in examined:
        if isinstance(error, Picture):
            continue
        if not config.skip_corrupt:
            raise UserError(f"{error}, or set data.skip_corrupt=true")
        warnings.warn(f"skipped: {error}", stacklevel=2)
    if num_skipped := len(examined) - len(result):
        intake.warn(f"{num_skipped} unreadable pictures are left out (data.skip_corrupt)")
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
