"""The discriminator's augmentation depends on a row's draws alone and lets gradients through."""

import pytest
import torch
from torch import nn

from tests.shared.gans import pictures
from trainers.data.rng import SampleRng
from trainers.from_scratch.augment import differentiable_augment

KINDS = ("color", "translation", "cutout")


def changed(x, *kinds):
    return differentiable_augment(x, kinds, SampleRng(0, 0, range(len(x))))


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_what_the_discriminator_sees_depends_on_the_rows_draws_alone_and_lets_gradients_through(
    kinds,
):
    x, step = pictures(4), torch.randn(4, 3, 16, 16)
    y = changed(x, *kinds)
    assert y.shape == x.shape
    assert not torch.equal(x, y)
    assert torch.equal(y, changed(x, *kinds))
    torch.testing.assert_close(differentiable_augment(x[2:3], kinds, SampleRng(0, 0, [2])), y[2:3])
    _, slope = torch.autograd.functional.jvp(lambda x: changed(x, *kinds), x, step)
    torch.testing.assert_close(
        slope, changed(x + step, *kinds) - y, rtol=1e-3, atol=1e-5
    )  # for it is affine


def test_without_a_kind_nothing_is_changed():
    assert torch.equal(changed(pictures()), pictures())


def test_translation_moves_whole_pixels_and_pads_with_nothing():
    x, shifts = pictures(60), []
    for before, after in zip(x, changed(x, "translation"), strict=True):
        wide = nn.functional.pad(before, (2, 2, 2, 2))
        moved = {(i, j): wide[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)}
        found = [at for at, picture in moved.items() if torch.allclose(picture, after, atol=1e-4)]
        assert len(found) == 1
        shifts += found
    assert len(set(shifts)) > 15  # of 25


def test_cutout_hides_one_rectangle_of_at_most_half_the_side_and_nothing_else():
    x = pictures(60) + 5
    areas = []
    for before, after in zip(x, changed(x, "cutout"), strict=True):
        hidden = (after == 0).all(0)
        assert torch.equal(after[:, ~hidden], before[:, ~hidden])
        rows, columns = hidden.any(1).sum(), hidden.any(0).sum()
        assert hidden.sum() == rows * columns
        assert max(rows, columns) <= 8
        areas.append(int(hidden.sum()))
    assert max(areas) > 40


def test_colour_moves_brightness_contrast_and_saturation_within_their_ranges():
    flat = torch.zeros(200, 3, 16, 16)
    shift = changed(flat, "color")[:, 0, 0, 0]
    torch.testing.assert_close(changed(flat, "color"), shift[:, None, None, None].expand_as(flat))
    assert -0.5 <= shift.min() < -0.4
    assert 0.4 < shift.max() <= 0.5
    gray = pictures(1, 1).expand(200, 3, 16, 16)
    contrast = changed(gray, "color").std((1, 2, 3)) / gray.std((1, 2, 3))
    assert 0.5 <= contrast.min() < 0.6
    assert 1.4 < contrast.max() <= 1.5
    x = pictures(200)
    y = changed(x, "color")
    spread = (y - y.mean(1, keepdim=True)).std((1, 2, 3)) / (x - x.mean(1, keepdim=True)).std(
        (1, 2, 3)
    )
    light = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))  # the contrast
    saturation = spread / light
    assert 0 <= saturation.min() < 0.1
    assert 1.9 < saturation.max() <= 2.001
