"""A finished U-Net shows its model pictures as training did, and gives results of their size."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from kornia.color import rgb_to_lab
from PIL import Image

from tests.shared.unets import copy_images, write_config
from trainers.config import loading
from trainers.data.imaging import to_float, write_grid
from trainers.data.pictures import picture_from_file
from trainers.from_scratch.checks import warn_of_squashing
from trainers.from_scratch.tiling import predict_tiled
from trainers.metrics.image_quality import confusion_metrics
from trainers.run import run
from trainers.unet import Translator, UNetTask

HEIGHT, WIDTH = 128, 192


@pytest.fixture(scope="module")
def speckled(tmp_path_factory):
    """Folder of pictures of 128 x 192 pixels: a bright disc, which the mask shows, among bright
    specks of 2 pixels, which vanish where the picture is resized to 32 x 32."""
    folder, rng = tmp_path_factory.mktemp("speckled"), np.random.default_rng(0)
    rows, columns = np.indices((HEIGHT, WIDTH))
    for i in range(8):
        center = rng.integers(40, 88), rng.integers(48, 144)
        disc = np.hypot(rows - center[0], columns - center[1]) < rng.uniform(20, 36)
        specks = (rows % 8 < 2) & (columns % 8 < 2)
        picture = rng.integers(0, 60, (HEIGHT, WIDTH, 3)) + 190 * (disc | specks)[..., None]
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}_image.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"{i}_mask.png")
    return folder


@pytest.fixture(scope="module")
def coloured(speckled, tmp_path_factory):
    """The pictures alone."""
    return copy_images(speckled, tmp_path_factory.mktemp("coloured"))


@pytest.fixture
def settings(speckled, coloured, tmp_path):
    """A function: use, overrides -> Config of a run on the speckled pictures."""
    path = write_config(tmp_path, speckled, resolution=32, steps=60)
    more = {"segment": []}
    alone = [f"data.image_dir={coloured}"]
    return lambda use, *overrides: loading.load_config(
        path, [f"use={use}", *more.get(use, alone), *overrides]
    )


@pytest.fixture
def untrained(settings):
    """A function: use, overrides -> Config of a run folder that holds first weights."""

    def save(use, *overrides):
        config = settings(use, *overrides)
        UNetTask.build(config, Accelerator(cpu=True))[0].save(config.output_dir)
        return config

    return save


def held_out(folder, end):
    return [folder / f"{i}_{end}.png" for i in (0, 4)]


def read(paths):
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])


def test_the_figure_of_translated_pictures_is_the_runs_own(settings, speckled):
    final = settings("segment")
    run(final)
    figures = json.loads((final.output_dir / "figures.json").read_text())
    translate = Translator(final, final.output_dir)
    made = [translate(path) for path in held_out(speckled, "image")]
    assert all(picture.size == (WIDTH, HEIGHT) for picture in made)
    predicted = torch.stack([torch.from_numpy(np.array(picture)) for picture in made]) // 255
    truth = read(held_out(speckled, "mask")) // 255
    dice = confusion_metrics(predicted.long(), truth.long(), 2, 255)["dice_1"]
    assert figures["dice_1"] > 0.85
    assert dice == pytest.approx(figures["dice_1"], abs=0.05)


@pytest.mark.parametrize("use", ["segment", "restore", "colorize"])
def test_pictures_of_the_training_size_are_predicted_as_in_the_run(untrained, tmp_path, use):
    config = untrained(use)
    task, _, _ = UNetTask.build(config, Accelerator(cpu=True))
    array = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    made = np.array(Translator(config, config.output_dir)(tmp_path / "picture.png"))
    x = task.use.to_input(torch.from_numpy(array).permute(2, 0, 1)[None])
    with torch.no_grad():
        y = task.use.postprocess(task.model(x))
    expected = 255 * y[0] if use == "segment" else (task.use.to_image(x, y)[0] + 1) * 127.5
    expected = expected.round().clamp(0, 255).numpy()
    assert (
        np.abs(
            made.astype(float) - (expected if use == "segment" else expected.transpose(1, 2, 0))
        ).max()
        <= 1
    )


@pytest.mark.parametrize(
    ("overrides", "full_size"),
    [((), True), (("data.crop=true",), False), (("data.crop=true",), True)],
)
def test_a_model_of_crops_or_full_size_goes_over_pictures_in_tiles(
    untrained, speckled, overrides, full_size
):
    config = untrained("segment", *overrides)
    translate = Translator(config, config.output_dir, full_size)
    path = speckled / "0_image.png"
    x = to_float(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None])
    with torch.no_grad():
        expected = predict_tiled(translate.model, x, 32).argmax(1)[0]
    assert np.array_equal(np.array(translate(path)), 255 * expected)


def test_colours_are_given_to_the_picture_at_its_own_size(untrained, speckled):
    config = untrained("colorize")
    path = speckled / "0_image.png"
    made = Translator(config, config.output_dir)(path)
    lightness = [
        rgb_to_lab(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0, 0]
        for picture in (made, Image.open(path))
    ]
    assert (lightness[0] - lightness[1]).abs().max() < 1


@pytest.mark.parametrize("crop", [False, True])
def test_an_enlarged_picture_is_so_many_times_as_large_as_what_was_given(untrained, speckled, crop):
    config = untrained("restore", "objective.downscale=2", f"data.crop={crop}")
    made = Translator(config, config.output_dir)(speckled / "0_image.png")
    assert made.size == (2 * WIDTH, 2 * HEIGHT)


def test_a_factor_that_does_not_divide_the_resolution_is_refused(settings):
    with pytest.raises(Exception, match=r"objective.downscale: must divide data.resolution, 32"):
        settings("restore", "objective.downscale=3")


# Shapes


def squash_warning(paths, config, recwarn):
    warn_of_squashing([picture_from_file(path) for path in paths], config)
    return [str(w.message) for w in recwarn if "squashed" in str(w.message)]


def test_squashed_pictures_are_warned_of_by_how_much(settings, speckled, recwarn):
    paths = held_out(speckled, "image")
    (message,) = squash_warning(paths, settings("segment"), recwarn)
    assert "2 of 2 pictures are not square and are squashed to 32 x 32 pixels" in message
    assert "one side is 1.50 times as long as the other" in message
    assert "data.crop=true" in message


def test_crops_and_square_pictures_are_not_warned_of(settings, speckled, tmp_path, recwarn):
    Image.new("RGB", (100, 97)).save(tmp_path / "square.png")
    assert not squash_warning([tmp_path / "square.png"], settings("segment"), recwarn)
    paths = held_out(speckled, "image")
    assert not squash_warning(paths, settings("segment", "data.crop=true"), recwarn)


def test_pictures_keep_their_shape_in_a_grid(tmp_path):
    wide, tall = Image.new("RGB", (30, 10), "red"), Image.new("RGB", (10, 30), "blue")
    write_grid([("both", [wide, tall])], tmp_path / "grid.png", tile=30)
    grid = np.array(Image.open(tmp_path / "grid.png")).astype(int)
    for color, height, width in (([255, 0, 0], 10, 30), ([0, 0, 255], 30, 10)):
        rows, columns = np.nonzero((grid == color).all(2))
        assert np.ptp(rows) + 1 == height
        assert np.ptp(columns) + 1 == width
