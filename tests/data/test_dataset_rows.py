"""Rows of the `datasets` library hold pictures, and read no other file of this machine."""

import numpy as np
import pytest
from PIL import Image

from trainers.config import DataConfig, ImagesConfig
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images

COLORS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def load(name):
    return load_instance_pictures(DataConfig(dataset_name=str(name), instance_prompt="p"))


@pytest.fixture
def rows_with_paths(tmp_path, monkeypatch):
    """A .parquet file whose rows name files instead of holding pictures."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(path):
        image = {"bytes": None, "path": str(path)}
        features = datasets.Features(
            {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
        )
        name = tmp_path / "set.parquet"
        datasets.Dataset.from_dict({"image": [image]}, features).to_parquet(name)
        return name

    return write


def test_a_row_that_names_a_file_does_not_read_it(rows_with_paths, tmp_path):
    secret = tmp_path / "elsewhere.png"
    COLORS.save(secret)
    for path in (secret, "elsewhere.png", "../elsewhere.png", "/dev/zero"):
        with pytest.raises(UserError, match=r"set\.parquet\[0\] names a file"):
            load(rows_with_paths(path))


def test_small_networks_do_not_read_it_either(rows_with_paths, tmp_path):
    COLORS.save(tmp_path / "elsewhere.png")
    config = ImagesConfig(
        dataset_name=str(rows_with_paths(tmp_path / "elsewhere.png")), test_split=None
    )
    with pytest.raises(UserError, match=r"names a file instead of holding a picture"):
        load_images(config, "cpu")


def test_a_folder_that_the_datasets_library_lists_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    COLORS.save(tmp_path / "set/0.png")
    (picture,) = load(tmp_path / "set")
    assert picture.decode().tobytes() == COLORS.tobytes()


def test_a_column_without_pictures_is_named(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"data.image_column: the column 'image' .*no pictures"):
        load(tmp_path / "set.parquet")
