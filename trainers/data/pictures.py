"""Pictures with their captions, from a folder or the `datasets` library."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from trainers.config import DataConfig
from trainers.data import decoding
from trainers.data.bit_depth import check_bit_depth
from trainers.data.caption_variants import AS_WRITTEN, Wording
from trainers.data.captions import read_captions
from trainers.data.dataset_rows import open_dataset, read_encoded, read_row_captions
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


@dataclass(frozen=True)
class Picture:
    """One picture: its name for messages, a way to read its encoded bytes, its caption.

    bit_depth: how many bits a deep picture uses, see `decoding.decode`; repeats: how often it
    counts among the others; other_captions: of which a visit may draw one too; wording: how a
    caption becomes the text of a visit; file: what `read` reads, if it is an ordinary file; known:
    what was found out before.
    """

    name: str
    read: Callable[[], bytes]
    caption: str
    bit_depth: int | None = None
    repeats: int = 1
    other_captions: tuple[str, ...] = ()
    wording: Wording = AS_WRITTEN
    file: Path | None = None
    known: KnownPicture | None = field(default=None, compare=False, repr=False)

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.other_captions)

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
        wording, prompt = Wording.from_config(config), config.instance_prompt
        pictures = pictures_from_folder(folder, config, prompt, intake, column, wording)
        source = str(folder)
    return keep_readable(pictures, config, source, intake)


def load_held_out_pictures(config: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """Photos of the subject that are only measured on. Raises: UserError, as
    `load_instance_pictures`."""
    folder = config.held_out_dir
    # a folder without metadata may stand beside one that has it
    has_metadata = bool(scan_folder(folder).metadata) and not config.dataset_name
    column = config.caption_column if has_metadata else None
    intake, prompt = intake or Intake(), config.instance_prompt
    # so that every measurement reads the same text
    wording = Wording.from_config(config).unvaried
    pictures = pictures_from_folder(folder, config, prompt, intake, column, wording)
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


def pictures_from_folder(  # noqa: PLR0913 (all that the pictures of a folder depend on)
    folder: Path,
    config: DataConfig,
    prompt: str | None,
    intake: Intake,
    column: str | None = None,
    wording: Wording | None = None,
) -> list[Picture]:
    """The pictures of a folder and its sub-folders with their captions, see `read_captions`.

    Without one of its own a picture has `prompt`, and without that the name of its folder, where
    that is one of kohya's.
    """
    others = (config.instance_data_dir, config.held_out_dir, config.class_data_dir)
    contents = scan_folder(folder, others)
    captions = read_captions(contents, column, config.caption_lines)
    # class pictures have their captions as they are
    wording = wording or Wording(trigger=config.trigger or "")
    pictures = []
    for path in contents.pictures:
        repeats, folder_caption = kohya_repeats(path, folder)
        fallback = folder_caption if prompt is None else prompt
        own = captions.by_picture.get(path, (fallback,))
        first, *others = wording.complete_all(own, path.name)
        read, depth = partial(decoding.read_file, path), config.bit_depth
        texts = first, depth, repeats, tuple(others), wording
        pictures.append(Picture(str(path), read, *texts, file=path))
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
    wording, pictures, num_without = Wording.from_config(config), [], 0
    for i, captions in enumerate(read_row_captions(rows, config)):
        num_without += not captions
        own = captions or (config.instance_prompt,)
        first, *others = wording.complete_all(own, f"{name}[{i}]")
        read, depth = partial(read_encoded, rows, i, column), config.bit_depth
        pictures.append(Picture(f"{name}[{i}]", read, first, depth, 1, tuple(others), wording))
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
