"""A folder as people have them: 40 files and more of 25 kinds, most of them with something odd."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from trainers.data.decoding import readable_formats

# what the run is expected to say of each file, or a part of it; `learnt` where it is used
LEARNT = "learnt"


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with edges that no other seed gives."""
    random = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), random.integers(120, 200, 3), np.uint8)
    for _ in range(24):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        w, h = random.integers(8, 60, 2)
        pixels[y : y + h, x : x + w] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def huge_by_its_header() -> bytes:
    """A PNG that says it has 3600 million pixels, and holds none."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def twelve_bits() -> Image.Image:
    values = np.asarray(scene(30).convert("L")).astype(np.uint16) * 16
    return Image.fromarray(values)


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


def write_plain(folder: Path) -> dict[str, str]:
    """Pictures of every format and mode that can be read."""
    palette = scene(8).convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [scene(9), scene(10)]
    files = {
        "a photo.JPG": encoded(scene(0), "JPEG"),
        "b.jpeg": encoded(scene(1), "JPEG"),
        "c.png": encoded(scene(2), "PNG"),
        "d.webp": encoded(scene(3), "WEBP"),
        "e.bmp": encoded(scene(4), "BMP"),
        "f.TIFF": encoded(scene(5), "TIFF"),
        "g.jfif": encoded(scene(7), "JPEG"),
        "h palette.png": encoded(palette, "PNG"),
        "i moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "j turned.jpg": encoded(scene(11), "JPEG", exif=turned_exif()),
        "k alpha.png": encoded(scene(12).convert("RGBA"), "PNG"),
        "l four colors.jpg": encoded(scene(13).convert("CMYK"), "JPEG"),
        "m gray.png": encoded(scene(14).convert("L"), "PNG"),
        "n one bit.png": encoded(scene(15).convert("1"), "PNG"),
        "o wrong ending.jpg": encoded(scene(16), "PNG"),
        "p panorama.jpg": encoded(scene(17, (600, 90)), "JPEG"),
        "q tiny.png": encoded(scene(18, (9, 7)), "PNG"),
        "r large.jpg": encoded(scene(19).resize((4000, 3000)), "JPEG"),
        "häßlich ☃.png": encoded(scene(20), "PNG"),
        "<b>&amp;.png": encoded(scene(6), "PNG"),
    }
    if "AVIF" in readable_formats():
        files["s.avif"] = encoded(scene(21), "AVIF")
    return write_all(folder, files, LEARNT)


def write_alike(folder: Path) -> dict[str, str]:
    """Copies and blurred ones of pictures that are there; what is said of them on the page."""
    first = scene(2)
    width, height = first.size
    smaller = first.crop((2, 2, width - 2, height - 2)).resize((width // 2, height // 2))
    files = {
        "c copy.bmp": encoded(first, "BMP"),
        "c smaller.jpg": encoded(smaller, "JPEG", quality=70),
        "t blurred.png": encoded(scene(22).filter(ImageFilter.GaussianBlur(4)), "PNG"),
    }
    return write_all(folder, files, LEARNT)


def write_broken(folder: Path) -> dict[str, str]:
    """Pictures that cannot be read."""
    whole = encoded(scene(23), "JPEG")
    files = {
        "u half.jpg": whole[: len(whole) // 2],
        "v empty.png": b"",
        "w page.png": b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        "x too large.png": huge_by_its_header(),
        "y deep.png": encoded(twelve_bits(), "PNG"),
        "z.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    }
    outcomes = write_all(folder, files, "not used: ")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nothing.png")
    return outcomes | {"pipe.png": "not an ordinary file", "link.png": "link to a file"}


def write_beside(folder: Path) -> dict[str, str]:
    """Captions, and files that are neither pictures nor captions."""
    outcomes = write_all(folder, {"b.txt": b"a sks dog on the grass"}, "caption of b.jpeg")
    outcomes |= write_all(folder, {"c.caption": b"a sks dog"}, "caption of c.png")
    outcomes |= write_all(folder, {"nobody.txt": b"a sks dog"}, "no picture belongs to")
    outcomes |= write_all(folder, {"d.txt": b""}, "is empty")
    outcomes |= write_all(folder, {"e.txt": b"\xff\xfe\xfa"}, "not UTF-8")
    outcomes |= write_all(folder, {"film.mp4": bytes(20)}, "pictures are not taken out")
    outcomes |= write_all(folder, {"raw.nef": bytes(20)}, "save them as JPEG or PNG")
    outcomes |= write_all(folder, {"no ending": encoded(scene(24), "PNG")}, "need the ending")
    outcomes |= write_all(folder, {"README.txt": b"mine", "notes.docx": b"x"}, "not used")
    return outcomes | write_all(folder, {".DS_Store": b"x", "Thumbs.db": b"x"}, "ignored")


def write_below(folder: Path) -> dict[str, str]:
    """Sub-folders, kohya's and one that a run wrote."""
    outcomes = {}
    for name, seed in (("more", 25), ("3_sks dog", 26), ("0_sks dog", 27)):
        (folder / name).mkdir()
        content = {f"{name}/1.png": encoded(scene(seed), "PNG")}
        expected = "0 leaves them out" if name.startswith("0") else LEARNT
        outcomes |= write_all(folder, content, expected)
    (folder / "run").mkdir()
    write_all(folder, {"run/.lock": b"", "run/1.png": encoded(scene(28), "PNG")}, "")
    return outcomes | {"run": "not read"}


def write_all(folder: Path, files: dict[str, bytes], outcome: str) -> dict[str, str]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return dict.fromkeys(files, outcome)


def write_messy_folder(folder: Path) -> dict[str, str]:
    """Fill a folder; returns a part of what is to be said of each file in it."""
    folder.mkdir(parents=True)
    outcomes: dict[str, str] = {}
    for write in (write_plain, write_alike, write_broken, write_beside, write_below):
        outcomes |= write(folder)
    return outcomes
