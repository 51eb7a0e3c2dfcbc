"""Folds of a set of pictures, and keys that mean nothing to its source."""

import pytest

from trainers.data.pictures import Picture
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images

pytestmark = pytest.mark.usefixtures("measured_quickly")


@pytest.mark.parametrize("source", ["autoencoder", "segment"])
def test_each_picture_is_held_out_by_one_fold_and_learnt_from_in_the_others(make, blobs, source):
    pairs = source == "segment"
    lone = ["data.dataset_name=null", f"data.image_dir={blobs}", "data.folds=4"]
    everything = sorted(str(path) for path in blobs.glob("*_image.png" if pairs else "*.png"))
    held_out = []
    for fold in range(4):
        data = make(source, "folds", *([] if pairs else lone), f"data.fold={fold}").data
        both = (
            load_images(data, "cpu", part, Picture.decode if pairs else None)
            for part in (False, True)
        )
        train_images, held = ([sample.picture.name for sample in images.samples] for images in both)
        assert sorted(train_images + held) == everything
        held_out += held
    assert sorted(held_out) == everything


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("data set", "data.folds=4"),
        ("data set", "data.fold=1"),
        ("folder", "data.label_column=label"),
    ],
)
def test_keys_that_mean_nothing_to_a_source_of_pictures_are_refused(make, blobs, source, key):
    folder = ["data.dataset_name=null", f"data.image_dir={blobs}"] if source == "folder" else []
    with pytest.raises(UserError, match=key.partition("=")[0]):
        make("autoencoder", "foreign", *folder, key)
