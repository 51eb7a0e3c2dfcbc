"""A data set of the `datasets` library gives the same pictures and captions as a folder."""

import numpy as np
import pytest

from tests.shared.pictures import data
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError


@pytest.fixture
def parquet(photos, tmp_path, monkeypatch):
    """A function: captions -> a parquet file of as many photos; None among the pictures where
    asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(captions, absent=()):
        features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
        images = [
            {"bytes": (photos / f"{i}.png").read_bytes(), "path": None}
            for i in range(len(captions))
        ]
        rows = {
            "image": [None if i in absent else image for i, image in enumerate(images)],
            "words": captions,
        }
        path = tmp_path / "set.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(path)
        return data(dataset_name=str(path), caption_column="words")

    return write


def test_a_parquet_set_gives_the_same_pictures_as_the_folder(parquet, photos):
    captions = [f"photo {i}" for i in range(5)]
    ours, folder = load_instance_pictures(parquet(captions)), load_instance_pictures(data(photos))
    assert [(p.digest, p.caption) for p in ours] == [
        (p.digest, c) for p, c in zip(folder, captions, strict=True)
    ]
    assert all(np.array_equal(a.decode(), b.decode()) for a, b in zip(ours, folder, strict=True))


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_a_missing_column_lists_those_that_exist(parquet, key):
    wrong = parquet(["a"]).model_copy(update={key: "picture"})
    with pytest.raises(
        UserError, match=rf"data.{key}: .* no column 'picture', it has image, words"
    ):
        load_instance_pictures(wrong)


def test_a_data_set_that_is_not_available_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.dataset_name: cannot load '.*absent.parquet'"):
        load_instance_pictures(data(dataset_name=str(tmp_path / "absent.parquet")))


def test_a_row_without_caption_takes_the_prompt_or_is_reported(parquet):
    settings = parquet(["one", None])
    assert [p.caption for p in load_instance_pictures(settings)] == ["one", "prompt"]
    with pytest.raises(UserError, match="no caption"):
        load_instance_pictures(settings.model_copy(update={"instance_prompt": None}))


def test_a_row_without_picture_is_named_or_skipped(parquet):
    settings = parquet(["one", "two"], absent=[1])
    with pytest.raises(UserError, match=r"set.parquet\[1\]"):
        load_instance_pictures(settings)
    with pytest.warns(UserWarning, match="skipped"):
        assert [
            p.caption
            for p in load_instance_pictures(settings.model_copy(update={"skip_corrupt": True}))
        ] == ["one"]
