"""What is measured or shown of a part of a data set does not depend on the order of its rows."""

import io
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from trainers.autoencoder import Autoencoder
from trainers.config import AutoencoderConfig, GanConfig, UNetConfig
from trainers.data.pictures import Picture
from trainers.data.rng import choose_rows
from trainers.from_scratch.classifier import train_classifier
from trainers.from_scratch.image_sets import ImageSample, ImageSet
from trainers.from_scratch.uses.colorize import Colorize
from trainers.gan import Gan


def test_rows_are_chosen_by_the_seed_without_replacement_and_all_of_them_where_they_are_few():
    assert list(choose_rows(0, 5, 7)) == list(range(5))
    chosen = choose_rows(0, 1000, 100)
    assert chosen == choose_rows(0, 1000, 100) != choose_rows(1, 1000, 100)
    assert len(set(chosen)) == 100
    # the mean of 100 of 0..999 without replacement is 499.5 with a standard error of 27.4
    assert abs(np.mean(chosen) - 499.5) < 4 * 27.4


@pytest.fixture(scope="module")
def sorted_bars(bars, tmp_path_factory):
    """The bars, all of class 0 before those of class 1."""
    folder = tmp_path_factory.mktemp("sorted")
    for split in ("train", "test"):
        rows = datasets.Dataset.from_parquet(str(bars / f"{split}.parquet"))
        rows.sort("label").to_parquet(folder / f"{split}.parquet")
    return folder


def of_bars(folder, kind, tmp_path):
    data = {"dataset_name": str(folder), "label_column": "label"}
    task, make_config, side = {
        "autoencoder": (Autoencoder, AutoencoderConfig, 16),
        "gan": (Gan, GanConfig, 28),
    }[kind]
    config = make_config(output_dir=tmp_path, data=data | {"resolution": side}, model={"width": 8})
    return task(config, Accelerator(cpu=True))


def test_the_linear_probe_of_sorted_data_is_that_of_shuffled_data(
    bars, sorted_bars, tmp_path, monkeypatch
):
    """Fitted on a fifth of the training pictures; the first of sorted ones are of one class."""
    monkeypatch.setattr("trainers.autoencoder.NUM_PROBE_PICTURES", 24)
    probes = [
        of_bars(folder, "autoencoder", tmp_path).evaluate()["linear_probe"]
        for folder in (bars, sorted_bars)
    ]
    assert all(probe > 0.85 for probe in probes)


def test_a_gan_is_compared_with_pictures_of_every_class_of_sorted_data(
    sorted_bars, tmp_path, monkeypatch
):
    monkeypatch.setattr("trainers.gan.NUM_METRIC_PICTURES", 20)
    monkeypatch.setattr("trainers.gan.train_classifier", partial(train_classifier, steps=1))
    seen = {}

    def record(generated, true, net):
        seen["lower"] = true[:, :, 14:].mean((1, 2, 3)) > true[:, :, :14].mean((1, 2, 3))
        return {}

    monkeypatch.setattr("trainers.gan.distribution_metrics", record)
    of_bars(sorted_bars, "gan", tmp_path).evaluate()
    assert len(seen["lower"]) == 20
    assert 4 <= int(seen["lower"].sum()) <= 16


def test_the_weights_of_colours_do_not_depend_on_the_order_of_the_pictures():
    """Half of the pictures are red, half blue; a tenth of them is looked at."""
    use = Colorize(UNetConfig(objective={"rebalanced": True}, data={"channels": 3}))
    pixels = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    pixels[:100, 0] = pixels[100:, 2] = 255
    picture = Picture("", partial(encoded, pixels[0]), "")
    samples = [ImageSample(picture, label=i) for i in range(200)]
    images = ImageSet(samples, lambda sample: pixels[sample.label], True, "cpu")
    use.prepare(images, limit=20)
    rarest_two = use.bin_weights.topk(2, largest=False).values
    assert use.bin_weights.max() > 2 * rarest_two.max()


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()
