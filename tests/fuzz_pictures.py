"""Pictures of every kind, damaged and disguised at random: each is read right, or refused by name.

python tests/fuzz_pictures.py [--cases 600] [--seed 0] [--only NUMBER]

Exit status 1 for a traceback, a hang, a program that is started, memory beyond a few GiB, a picture
that is left out without a word, or other pixels than the undamaged file shows.
"""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageCms

from tests.shared import fuzzing
from tests.shared.fuzzing import Case, append, blank, flip_bits, flip_in_header, truncate
from trainers.config import DataConfig, ImagesConfig
from trainers.data.decoding import FORMATS, IMAGE_SUFFIXES
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.pictures import picture_from_file
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.masks import read_mask

SECONDS_PER_CASE = 30
SIZE = (40, 24)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
OPTIONS = ({}, {"quality": 20}, {"compress_level": 0}, {"compression": "tiff_lzw"})
OPTIONS += ({"save_all": True}, {"progressive": True}, {"lossless": True})
# how far a lossy format may be from the drawing, of 255 on average; their colors are few and large
LOSSY = 30

Damage = Callable[[Path, random.Random], bytes | None]


def drawing() -> Image.Image:
    """A ramp from left to right and a dark corner, so that every turn of it is another picture."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[..., 0] = np.linspace(40, 250, SIZE[0])[None]
    pixels[..., 1] = np.linspace(60, 200, SIZE[1])[:, None]
    pixels[:12, :12] = 16
    return Image.fromarray(pixels)


DRAWING = drawing()


def encoded(format: str, rng: random.Random) -> bytes | None:
    """The drawing in a format, with a mode, options, EXIF and a profile; None where it has none."""
    mode = rng.choice(MODES)
    image = DRAWING.convert("L").convert("I").convert(mode) if mode == "I;16" else None
    image = image or DRAWING.convert("RGB").convert(mode)
    options: dict = dict(rng.choice(OPTIONS))
    if "save_all" in options:
        options["append_images"] = [image.copy(), image.copy()]
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x112] = rng.choice((0, 1, 3, 6, 8, 9, 200))
        exif[0x10E] = rng.choice(("", "x" * 3000))
        options["exif"] = exif.tobytes()
    if rng.random() < 0.3:
        good = ImageCms.ImageCmsProfile(ImageCms.createProfile(rng.choice(("sRGB", "LAB", "XYZ"))))
        options["icc_profile"] = rng.choice((b"", b"x" * 200, good.tobytes()))
    # Pillow's writer of AVIF crashes by some profiles and frames; nothing here writes AVIF
    for given in ({},) if format == "AVIF" else (options, {}):
        buffer = io.BytesIO()
        try:
            image.save(buffer, format, **given)
            return buffer.getvalue()
        except Exception:
            continue
    return None


def some_file(rng: random.Random, formats: tuple[str, ...]) -> tuple[str, bytes]:
    """A format, and a file of it."""
    while True:
        format = rng.choice(formats)
        if data := encoded(format, rng):
            return format, data


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG of parts that need not fit each other."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def text_bomb() -> bytes:
    """A PNG whose comment is a hundred million zeros, packed."""
    comment = b"a\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(comment)) + b"zTXt" + comment
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + comment))
    whole = encoded_png()
    return whole[:33] + chunk + whole[33:]


def encoded_png() -> bytes:
    buffer = io.BytesIO()
    DRAWING.save(buffer, "PNG")
    return buffer.getvalue()


def tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    """A TIFF of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run showpage\n%%EOF\n"
ODD_FILES = {
    "postscript": lambda: POSTSCRIPT,
    "binary EPS": lambda: (
        struct.pack("<7I", 0xC6D3D0C5, 32, len(POSTSCRIPT), 0, 0, 0, 0) + bytes(4) + POSTSCRIPT
    ),
    "PDF": lambda: b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "WMF": lambda: b"\xd7\xcd\xc6\x9a" + bytes(200),
    "EMF": lambda: b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(200),
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "HTML": lambda: b"<!DOCTYPE html><img src=x onerror=alert(1)>",
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "program": lambda: b"#!/bin/sh\ntrue\n",
    "empty": lambda: b"",
    "zeros": lambda: bytes(5000),
    "large by its header": lambda: png(60_000, 60_000, b""),
    "wide by its header": lambda: png(2**31 - 1, 1, b""),
    "no width": lambda: png(0, 5, b""),
    "many pixels": lambda: png(3000, 3000, zlib.compress(bytes(3000 * 9001))),
    "pixel bomb": lambda: png(12_000, 12_000, zlib.compress(bytes(12_000 * 36_001))),
    "too few pixels": lambda: png(99, 99, zlib.compress(bytes(50))),
    "no palette": lambda: png(9, 9, zlib.compress(bytes(90)), 8, 3),
    "one pixel": lambda: png(1, 1, zlib.compress(bytes(4))),
    "one row": lambda: png(30_000, 1, zlib.compress(bytes(90_001))),
    "comment bomb": text_bomb,
    "TIFF without pixels": lambda: tiff([(256, 4, 1, 9), (257, 4, 1, 9)]),
    "TIFF of itself": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "TIFF with a huge table": lambda: tiff([(256, 4, 2**31, 8)] * 50),
    "BMP of negative size": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -9, -9, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "GIF without frames": lambda: b"GIF89a\x09\0\x09\0\0\0\0;",
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "half an AVIF": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100),
    "WebP of nothing": lambda: b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0",
    "JPEG of nothing": lambda: b"\xff\xd8\xff\xd9",
}


# Damage; each gives what the file held before, or None where nothing is known about it


def every_format() -> tuple[str, ...]:
    Image.init()
    # a PDF names programs and fonts of this machine, and is none of ours
    return tuple(sorted(set(Image.SAVE) - {"PDF"}))


def undamaged(path: Path, rng: random.Random) -> bytes | None:
    """A whole file of any format that Pillow writes."""
    format, data = some_file(rng, every_format())
    path.write_bytes(data)
    return data if format in FORMATS else None


def damaged(path: Path, rng: random.Random) -> bytes | None:
    change = rng.choice((flip_bits, flip_in_header, flip_in_header, blank, append))
    path.write_bytes(change(some_file(rng, tuple(FORMATS))[1], rng))
    return None


def truncated(path: Path, rng: random.Random) -> bytes | None:
    _, data = some_file(rng, tuple(FORMATS))
    path.write_bytes(truncate(data, rng))
    return data


def odd_file(path: Path, rng: random.Random) -> bytes | None:
    path.write_bytes(ODD_FILES[rng.choice(sorted(ODD_FILES))]())
    return None


def no_file(path: Path, rng: random.Random) -> bytes | None:
    path.write_bytes(b"x")
    fuzzing.replace_path(path, rng)
    if not path.exists() and not path.is_symlink():
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kmsg")))
    return None


KINDS: tuple[Damage, ...] = (undamaged, damaged, damaged, truncated, odd_file, no_file, undamaged)


# What must come of it


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    if one.size != other.size:
        return 255.0
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())


def as_drawn(image: Image.Image) -> bool:
    """Whether a picture shows the drawing, in any of its turns, in color or gray."""
    for mode in ("RGB", "L", "1"):
        stored = DRAWING.convert(mode).convert("RGB")
        for wanted in (stored, *(stored.transpose(turn) for turn in Image.Transpose)):
            if mean_difference(image, wanted) < LOSSY:
                return True
    return False


def check(damage: Damage, seed: str, folder: Path) -> str:
    """A folder with a good picture and another one, which is read as photos and in a small set."""
    rng = random.Random(seed)
    photos = folder / "photos"
    photos.mkdir()
    DRAWING.save(photos / "good.png")
    path = photos / f"x{rng.choice(sorted(IMAGE_SUFFIXES))}"
    before = damage(path, rng)
    keys = {"instance_data_dir": photos, "instance_prompt": "a b", "bit_depth": 8}
    skips = rng.random() < 0.2
    refusal = None
    try:
        pictures = load_instance_pictures(DataConfig(**keys, skip_corrupt=skips))
    except UserError as error:
        if path.name not in str(error):
            return f"{seed}: {path.name} is not named: {error}"
        refusal = error
    if refusal and skips and "cannot be read" not in str(refusal) and not path.is_dir():
        return f"{seed}: data.skip_corrupt is true, and it was refused: {refusal}"
    is_read = refusal is None and any(Path(p.name).name == path.name for p in pictures)
    if refusal is None and not is_read and not skips and not path.is_dir():
        return f"{seed}: {path.name} is left out without a word"
    small = small_set(photos)
    if is_read != small and not path.is_dir():
        return f"{seed}: photos {is_read}, small networks {small}: {refusal}"
    check_mask(path)
    if refusal:
        raise refusal
    if not is_read:
        return "refused"
    shown = next(p for p in pictures if Path(p.name).name == path.name).decode()
    if shown.mode != "RGB" or min(shown.size) < 1:
        return f"{seed}: {shown.mode} {shown.size}"
    if before is None or as_drawn(shown):
        return "accepted"
    return f"{seed}: {path.name} shows something else ({Image.open(io.BytesIO(before))})"


def small_set(photos: Path) -> bool:
    """Whether the small networks read the folder."""
    config = ImagesConfig(image_dir=photos, resolution=16, bit_depth=8)
    try:
        return len(load_images(config, "cpu")) > 1
    except UserError:
        return False


def check_mask(path: Path) -> None:
    with suppress(UserError):
        read_mask(picture_from_file(path), classes=2)


def cases(root: Path, count: int, seed: int) -> Iterator[Case]:
    """Each a function of seed and number, so that one case can be had again."""
    for number in range(count):
        damage = KINDS[number % len(KINDS)]
        yield Case(damage.__name__, partial(check, damage, f"{seed} {number}"))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(fuzzing.main(__doc__, cases, SECONDS_PER_CASE, 600))
