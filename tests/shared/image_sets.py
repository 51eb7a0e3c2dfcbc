"""Photos to learn from, and small sets of pictures with labels, masks and targets."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image


def write_photos(folder, seed=0):
    """Five pictures of noise, each of another size."""
    r = np.random.default_rng(seed)
    for i in range(5):
        picture = r.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def write_shapes(folder, seed=0):
    """Six pictures of noise: portraits, landscapes and a square."""
    r = np.random.default_rng(seed)
    sizes = [(24, 40), (40, 24), (32, 32), (25, 44), (60, 33), (26, 40)]
    for i, (width, height) in enumerate(sizes):
        picture = r.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def write_bars(folder):
    """train.parquet and test.parquet: a bar in the upper half of 16 px is class 0, else 1."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 40)):
        rows = {"image": [], "label": []}
        for i in range(count):
            picture = np.zeros((16, 16), np.uint8)
            at = rng.integers(0, 6) + 8 * (i % 2)
            buffer = io.BytesIO()
            picture[at : at + 2] = rng.integers(150, 255)
            Image.fromarray(picture).save(buffer, "png")
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["label"].append(i % 2)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


def write_blobs(folder):
    """Eight pictures of several sizes, a bright disc in colour on a dark ground, as NAME_image.png;
    where the disc is, 0 or 255, as NAME_mask.png; its colours swapped, as NAME_target.png."""
    rng = np.random.default_rng(0)
    for i in range(8):
        height, width = 20 + i, 28 - i
        at = np.indices((height, width)) - rng.integers(7, 13, (2, 1, 1))
        disc = np.hypot(*at) < rng.uniform(4, 7)
        picture = rng.integers(0, 60, (height, width, 3)) + disc[..., None] * [180, 90, 20]
        arrays = {"image": picture, "mask": 255 * disc, "target": picture[..., ::-1]}
        for name, array in arrays.items():
            Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}_{name}.png")
    return folder


def write_parts(folder):
    """MVTec's folders: stripes of any phase, 16 x 16; spots and lines are defects, with masks."""
    rng = np.random.default_rng(0)

    def stripes():
        x = np.arange(16)[None] + rng.integers(0, 4)
        return 90 + 60 * (x % 4 < 2) + rng.integers(0, 12, (16, 16))

    def save(array, *place):
        path = folder.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(path)

    for part, count in (("train", 12), ("test", 6)):
        for i in range(count):
            save(stripes(), part, "good", f"{i:03d}.png")
    for kind, height, width in (("spot", 5, 5), ("line", 2, 10)):
        for i in range(4):
            mask = np.zeros((16, 16), bool)
            top, left = rng.integers(0, 16 - height), rng.integers(0, 16 - width)
            mask[top : top + height, left : left + width] = True
            save(np.where(mask, 230, stripes()), "test", kind, f"{i:03d}.png")
            save(255 * mask, "ground_truth", kind, f"{i:03d}_mask.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def captioned_photos(tmp_path_factory):
    """Photos with two captions each, with tags and a place for the trigger word."""
    folder = write_photos(tmp_path_factory.mktemp("captioned_photos"))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"{{trigger}} {number}, a, b\nc, d, e\n")
    return folder


@pytest.fixture(scope="session")
def other_photos(tmp_path_factory):
    """Photos that no run of a test learns from."""
    return write_photos(tmp_path_factory.mktemp("other_photos"), seed=1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("bars"))


@pytest.fixture(scope="session")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))
