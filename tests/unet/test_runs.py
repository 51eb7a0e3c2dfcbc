"""Each use of a U-Net learns on a small set."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trainers.data.pictures import Picture
from trainers.errors import UserError
from trainers.from_scratch.image_samples import samples_from_pairs
from trainers.from_scratch.image_sets import load_images
from trainers.metrics.image_quality import psnr
from trainers.run import run


def figures(final):
    run(final)
    return json.loads((final.output_dir / "figures.json").read_text())


def test_segment_finds_blobs(settings):
    assert figures(settings("segment", "data.channels=1", "data.random_flip=true"))["dice_1"] > 0.8


def test_pix2pix_learns_to_swap_colours_better_than_to_copy_or_to_guess_one_colour(settings):
    final = settings("pix2pix", "objective.l1_weight=100")
    reached = figures(final)["psnr"]
    x, y = (load_images(final.data, "cpu", True, Picture.decode).take(range(2)) / 127.5 - 1).split(
        3, 1
    )
    assert reached > 3 + max(psnr(x, y), psnr(y.mean((0, 2, 3), keepdim=True).expand_as(y), y))


@pytest.mark.parametrize("rebalanced", [False, True])
def test_colorize_comes_nearer_than_grey(settings, rebalanced):
    reached = figures(settings("colorize", f"objective.rebalanced={rebalanced}"))
    assert reached["psnr"] > reached["psnr_grey"] + 1
    assert reached["colourfulness"] > reached["colourfulness_true"] / 3


def test_restore_comes_nearer_than_what_it_is_shown(settings):
    reached = figures(settings("restore", "objective.noise=0.2"))
    assert reached["psnr"] > reached["psnr_shown"] + 1


def test_a_picture_has_the_longest_ending_that_fits_and_no_double(settings, tmp_path):
    for name in ("a", "a_mask", "b", "b_mask"):
        Image.new("L", (16, 16)).save(tmp_path / f"{name}.png")
    final = settings("segment", f"data.image_dir={tmp_path}", "data.image_suffix=''")
    pairs = [
        (Path(s.picture.name).name, Path(s.target.name).name)
        for s in samples_from_pairs(final.data)
    ]
    assert pairs == [("a.png", "a_mask.png"), ("b.png", "b_mask.png")]
    Image.new("L", (16, 16)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have one name"):
        samples_from_pairs(final.data)
