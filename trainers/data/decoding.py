"""From the bytes of a picture file to upright sRGB pixels, whatever it was stored as."""

from __future__ import annotations

import io
import stat
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

# Pillow's name of each format that is read, and how its files end. Others are refused, whatever
# their files are called: some start programs (EPS), and many decoders are little tested.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# what a missing decoder of a format takes to install
DECODERS = {"AVIF": "Pillow 11.3 or later", "HEIF": "pillow-heif: pip install pillow-heif"}
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")  # formats with frames or pages of equal rank
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

MAX_PIXELS = 2**27  # 134 million; the largest cameras take 100
MAX_FILE_BYTES = 2**30

ORIENTATION_TAG = 0x112
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
# how a stored picture becomes upright, by its orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC_TAG = 262  # of TIFF; its value 0 says that the lowest value is white
# the picture modes that the color spaces of ICC profiles describe
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}

# Python's warning filters belong to the process, not to a thread
FILTER_LOCK = threading.Lock()


class UnreadablePictureError(ValueError):
    """What is wrong with a picture, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class StoredAs:
    """How a file stores its picture.

    size: in pixels, before it is turned upright; orientation: EXIF's, 1 is upright;
    has_more_frames: it is an animation or has several pages; has_deep_gray, has_deep_colors: more
    than 8 bits per channel.
    """

    size: tuple[int, int]
    orientation: int
    mode: str
    has_more_frames: bool
    has_deep_gray: bool
    has_deep_colors: bool
    lowest_is_white: bool


@lru_cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here."""
    Image.init()
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of an ordinary file. Raises: UnreadablePictureError for anything else, such as a
    pipe, a device or a link to nothing, none of which is opened."""
    limit = f"is larger than {max_bytes / 2**20:.0f} MiB: make it smaller or remove it"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadablePictureError("is not an ordinary file: remove it from the folder")
        if status.st_size > max_bytes:
            raise UnreadablePictureError(limit)
        with path.open("rb") as file:
            # some files have no end and say that they are empty
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        reason = "is a link to a file that is not there" if path.is_symlink() else "is not there"
        raise UnreadablePictureError(f"{reason}: restore or remove it") from None
    except OSError as error:
        raise UnreadablePictureError(f"cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise UnreadablePictureError(limit)
    return data


def open_image(data: bytes) -> Image.Image:
    """The picture with its pixels still encoded. Raises: UnreadablePictureError, or what Pillow
    raises for broken data."""
    if not data:
        raise UnreadablePictureError("is not a readable picture (it is empty): mend or remove it")
    too_large = f"has more than {MAX_PIXELS / 1e6:.0f} million pixels: make it smaller"
    try:
        with FILTER_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=readable_formats())
    except Image.DecompressionBombError:
        raise UnreadablePictureError(too_large) from None
    except UnidentifiedImageError:
        raise unknown_format(data) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadablePictureError(f"is {width} x {height} and {too_large}")
    return image


def unknown_format(data: bytes) -> UnreadablePictureError:
    """Why nothing here can read these bytes."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    name = "HEIF" if brand in HEIF_BRANDS else "AVIF" if brand in (b"avif", b"avis") else None
    if name and name not in readable_formats():
        return UnreadablePictureError(
            f"is stored as {name}, which requires {DECODERS[name]}; or save it as JPEG"
        )
    names = ", ".join(readable_formats())
    return UnreadablePictureError(
        f"is not a readable picture (its content is none of {names}): mend or remove it"
    )


def read_storage(data: bytes) -> StoredAs:
    """How the picture is stored, from the beginning of its file. Raises: as `open_image`."""
    with open_image(data) as image:
        return storage_of(image)


def storage_of(image: Image.Image) -> StoredAs:
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    has_gray_values = image.mode.startswith("I") or image.mode == "F"
    # Pillow has no mode for colors of 16 bits, and keeps the upper 8 of each
    is_deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile) for tile in image.tile)
    return StoredAs(
        size=image.size,
        orientation=image.getexif().get(ORIENTATION_TAG, 1),
        mode=image.mode,
        # phones put gain maps and previews behind a JPEG
        has_more_frames=image.format in ANIMATED and getattr(image, "is_animated", False),
        has_deep_gray=has_gray_values,
        has_deep_colors=is_deep and not has_gray_values,
        lowest_is_white=is_tiff and image.tag_v2.get(PHOTOMETRIC_TAG) == 0,
    )


def decode(data: bytes, bit_depth: int | None = None) -> Image.Image:
    """RGB, upright by its EXIF tag, in sRGB by its profile, on white where it was transparent.

    bit_depth: how many bits the values of a deep picture use; None means 16. Raises: as
    `open_image`, and UnreadablePictureError for values beyond that depth.
    """
    with open_image(data) as opened:
        storage = storage_of(opened)
        image = ImageOps.exif_transpose(opened)
        profile = opened.info.get("icc_profile")
    if storage.has_deep_gray:
        image = to_8_bits(image, bit_depth or 16, storage.lowest_is_white)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = to_srgb(image, profile)
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_8_bits(image: Image.Image, bits: int, lowest_is_white: bool = False) -> Image.Image:
    """A gray picture (mode L) of one with more bits, of which it uses `bits`."""
    values, top = whole_numbers(image), 2**bits - 1
    if values.min() < 0 or values.max() > top:
        found = f"{values.min()} to {values.max()}"
        raise UnreadablePictureError(
            f"holds values from {found}, and {bits} bits end at {top}: set data.bit_depth to the "
            "bits that the pictures use, 16 at most"
        )
    if lowest_is_white:
        values = top - values
    return Image.fromarray((values * 255 // top).astype(np.uint8))


def whole_numbers(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise UnreadablePictureError(
            "holds floating-point numbers, whose range is not known: save it with 8 or 16 bits"
        )
    return np.asarray(image).astype(np.int64)


def largest_value(data: bytes) -> int:
    """The largest value of a picture of 16 bits; of colors, of which 8 bits are kept, what the
    largest stands for."""
    with open_image(data) as image:
        is_deep_gray = storage_of(image).has_deep_gray
        highest = int(whole_numbers(image).max())
    return highest if is_deep_gray else 256 * highest + 255


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in the color space of screens. A profile that is damaged or of another kind of picture
    is ignored, as viewers do."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES.get(source.profile.xcolor_space.strip())
        is_four_color = image.mode == "CMYK"
        if mode is None or is_four_color != (mode == "CMYK"):
            return image.convert("RGB")
        if mode == "L" and image.mode not in ("1", "L", "LA"):
            return image.convert("RGB")
        return ImageCms.profileToProfile(
            image.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
