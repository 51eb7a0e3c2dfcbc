"""A picture, its mask and its target change alike, by a row's own draws."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.shared.unets import draws, pixels
from trainers.config import ImagesConfig, PairsConfig
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.data.sampler import BatchSlice
from trainers.from_scratch.augment import augment
from trainers.from_scratch.image_sets import ImageBatches, ImageSample, ImageSet
from trainers.unet import UNetTask

SQUARE = {  # the symmetries of a square
    f"{turns}{'f' * flipped}": (
        lambda x, t=turns, f=flipped: (x.flip(-1) if f else x).rot90(t, (-2, -1))
    )
    for turns in range(4)
    for flipped in range(2)
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"random_flip"}, {"0", "0f"}),
        ({"random_vertical_flip"}, {"0", "2f"}),
        ({"random_rotate"}, {"0", "1", "2", "3"}),
        ({"random_flip", "random_vertical_flip", "random_rotate"}, set(SQUARE)),
    ],
)
def test_flips_and_turns_give_each_symmetry_of_the_square_that_they_can(keys, expected):
    x = pixels(1, 2, 8, 8).expand(200, 2, 8, 8)
    y = augment(x, ImagesConfig(**dict.fromkeys(keys, True)), draws(200), num_mask_channels=1)
    found = [{name for name, turn in SQUARE.items() if torch.equal(turn(x[0]), row)} for row in y]
    assert all(len(names) == 1 for names in found)
    counts = {name: sum(name in names for names in found) for name in SQUARE}
    assert {name for name, count in counts.items() if count} == expected
    assert min(counts[name] for name in expected) > 200 / len(expected) / 2


def test_without_changes_pictures_stay_as_they_are():
    x = pixels(3, 2, 8, 8)
    assert torch.equal(augment(x, ImagesConfig(), draws(3), num_mask_channels=1), x)


def test_a_picture_and_its_mask_move_alike_and_the_mask_keeps_its_values():
    """The mask is where the picture is bright, before and after."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    hills = torch.stack(
        [40 * (torch.sin(x / 5 + k) + torch.cos(y / 4 - k)) + 128 for k in range(20)]
    )
    mask = 3 * (hills > 128) + 255 * (hills < 80)
    both = torch.stack([hills, mask], 1).byte()
    every = {
        "random_flip": True,
        "random_vertical_flip": True,
        "random_rotate": True,
        "elastic": 3.0,
    }
    image, moved = augment(both, ImagesConfig(**every), draws(20), num_mask_channels=1).unbind(1)
    assert set(moved.unique().tolist()) == {0, 3, 255}
    assert ((moved == 3) == (image > 128)).float().mean() > 0.95
    assert ((moved == 255) == (image < 80)).float().mean() > 0.95
    assert ((moved == 3) == (hills > 128)).float().mean() < 0.8


def test_the_batches_of_a_task_keep_the_classes_of_its_masks(blobs, tmp_path, settings):
    for path in blobs.glob("*_image.png"):
        shutil.copy(path, tmp_path)
        mask = np.asarray(Image.open(str(path).replace("_image", "_mask")))
        Image.fromarray(2 * (mask > 0).astype(np.uint8)).save(
            tmp_path / path.name.replace("_image", "_mask")
        )
    bent = settings(
        "segment", f"data.image_dir={tmp_path}", "objective.classes=3", "data.elastic=3"
    )
    _, batches, _ = UNetTask.build(bent, Accelerator(cpu=True))
    ((batch, _),) = batches(0)
    assert batch["pixels"][:, -1].unique().tolist() == [0, 2]


def test_a_rows_changes_depend_on_its_own_draws_alone():
    x, every = pixels(4, 1, 16, 16), ImagesConfig(random_flip=True, random_rotate=True, elastic=2.0)
    assert torch.equal(
        augment(x[2:3], every, SampleRng(0, 0, [2])), augment(x, every, draws(4))[2:3]
    )


def test_elastic_moves_the_middle_by_the_middle_vector_of_its_grid():
    """A ramp's value tells where a pixel was taken from."""
    ramp = 12 * torch.arange(17.0) + 20
    both = (
        torch.stack([ramp.expand(17, 17), ramp[:, None].expand(17, 17)])
        .byte()
        .expand(30, 2, 17, 17)
    )
    bent = augment(both, ImagesConfig(elastic=1.5), draws(30))
    moved = (bent - both.float())[:, :, 8, 8] / 12
    vectors = 1.5 * draws(30).normal((30, 2, 3, 3))[:, :, 1, 1]
    torch.testing.assert_close(moved, vectors, rtol=0, atol=0.05)


def test_crops_are_windows_of_the_picture_and_its_target_and_reach_everywhere():
    """Channels hold the row and the column of each pixel."""
    grid = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(30), indexing="ij")).byte()
    images = ImageSet([ImageSample(Picture("", bytes, ""))], lambda sample: grid, True, "cpu")
    batches = ImageBatches(images, PairsConfig(crop=True, resolution=16), BatchSlice(0, 200))
    ((batch, _),) = batches(0)
    rows, columns = batch["pixels"].int().unbind(1)
    assert torch.equal(rows, rows[:, :1, :1] + torch.arange(16)[:, None].expand(200, 16, 16))
    assert torch.equal(columns, columns[:, :1, :1] + torch.arange(16).expand(200, 16, 16))
    assert set(rows[:, 0, 0].tolist()) == set(range(25))
    assert set(columns[:, 0, 0].tolist()) == set(range(15))
