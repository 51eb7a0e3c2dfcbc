"""Pictures with their captions, from a folder or the `datasets` library."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from trainers.config import ConceptConfig, DataConfig
from trainers.data import decoding
from trainers.data.bit_depth import check_bit_depth, is_deep
from trainers.data.caption_variants import AS_WRITTEN, Wording
from trainers.data.captions import read_captions
from trainers.data.dataset_rows import open_dataset, read_encoded, read_row_captions
from trainers.data.folders import collect_image_files, kohya_repeats, list_image_files, scan_folder
from trainers.data.intake import Intake
from trainers.data.masks import find_masks
from trainers.data.near_duplicates import perceptual_hash
from trainers.data.picture_memory import KnownPicture, PictureFacts
from trainers.data.sharpness import edge_blur, to_measured_size
from trainers.data.valid_captions import read_valid_captions
from trainers.errors import UserError, name_some

__all__ = [
    "Picture",
    "PictureFacts",
    "collect_image_files",
    "keep_readable",
    "list_image_files",
    "picture_from_file",
    "pictures_from_dataset",
    "pictures_from_folder",
]


@dataclass(frozen=True)
class Picture:
    """One picture: its name for messages, a way to read its encoded bytes, its caption.

    bit_depth: how many bits a deep picture uses, see `decoding.decode`; repeats: how often it
    counts among the others; other_captions: of which a visit may draw one too; wording: how a
    caption becomes the text of a visit; file: what `read` reads, if it is an ordinary file; known:
    what was found out before; mask: where it is learnt, see `trainers.data.masks`, a picture that
    is its own mask by its alpha channel; concept: the name of its set, if there are several.
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
    mask: Picture | None = None
    concept: str = ""

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

    @property
    def short_name(self) -> str:
        """For messages about several sets: files of two concepts may have one name."""
        name = Path(self.name).name
        return f"{self.concept}: {name}" if self.concept else name

    def read_named(self) -> bytes:
        with self.named_errors():
            return self.read()

    def read_unchanged(self) -> bytes:
        """Its bytes, which `digest` was made of. Raises: UserError where the file has changed
        since: what it shows would be taken for what it showed."""
        digest, data = self.digest, self.read_named()
        if self.content_digest(data) != digest:
            raise UserError(f"{self.name} has changed since the run began: start it again")
        return data

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
        gray = to_measured_size(image)
        look = perceptual_hash(gray), edge_blur(gray)
        return PictureFacts(image.size, fingerprint, storage, *look)

    @property
    def largest_value(self) -> int:
        """Of a picture with more than 8 bits."""
        with self.named_errors():
            return decoding.largest_value(self.read())

    def decode(self) -> Image.Image:
        """RGB, upright and in sRGB, see `decoding.decode`. Raises: UserError naming a broken
        file, or one that is known and has changed."""
        data = self.read_unchanged() if self.known else self.read_named()
        with self.named_errors():
            return decoding.decode(data, self.bit_depth)

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
    captions = read_valid_captions(
        contents, lambda some: read_captions(some, column, data.caption_lines), intake
    )
    # class pictures have their captions as they are
    wording = wording or Wording(trigger=photos.trigger or "")
    pictures = []
    for path in contents.pictures:
        number, folder_caption = intake.attempt(
            partial(kohya_repeats, path, folder), (1, None), [str(path)]
        )
        fallback = folder_caption if photos.instance_prompt is None else photos.instance_prompt
        own = captions.by_picture.get(path, (fallback,))
        complete = partial(wording.complete_all, own, path.name)
        first, *others = intake.attempt(complete, own, [str(path)])
        texts = first, data.bit_depth, number * photos.repeats, tuple(others), wording
        read = partial(decoding.read_file, path)
        picture = Picture(str(path), read, *texts, file=path, concept=photos.name)
        mask = picture if photos.use_alpha_mask else None
        if path in masks:
            mask = picture_from_file(masks[path])
        pictures.append(replace(picture, mask=mask))
    intake.describe_folder(contents, captions, pictures)
    return check_captions(pictures, folder, intake)


def check_captions(pictures: list[Picture], source: Path, intake: Intake) -> list[Picture]:
    """All, those without a caption with an empty one. Raises: UserError naming these."""
    uncaptioned = [picture.name for picture in pictures if picture.caption is None]
    if uncaptioned:
        shown = name_some([Path(name).name for name in uncaptioned])
        advice = "set data.instance_prompt, or put a .txt beside each"
        intake.fail(UserError(f"no caption for {shown} in {source.name}: {advice}"), uncaptioned)
    return [p if p.caption is not None else replace(p, caption="") for p in pictures]


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
    return check_captions(pictures, Path(name), intake)


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
    for picture, error in zip(pictures, examined, strict=True):
        if isinstance(error, Picture):
            continue
        if config.skip_corrupt:
            intake.left_out[picture.name] = str(error)
            warnings.warn(f"skipped: {error}", stacklevel=2)
        else:
            advice = f"{error}, or set data.skip_corrupt=true"
            intake.fail(UserError(advice), [picture.name])
    num_skipped = len(examined) - len(result)
    if num_skipped and config.skip_corrupt:
        intake.warn(f"{num_skipped} unreadable pictures are left out (data.skip_corrupt)")
    if not examined:
        suffixes = ", ".join(sorted(decoding.IMAGE_SUFFIXES))
        intake.fail(UserError(f"{source} holds no pictures ({suffixes})"))
    elif not result:
        intake.fail(UserError(f"{source}: none of its {len(examined)} pictures can be read"))
    try:
        check_bit_depth(result, config.bit_depth)
    except UserError as error:
        intake.fail(error, [picture.name for picture in result if is_deep(picture)])
    return result
