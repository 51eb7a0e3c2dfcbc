"""Figures of the small networks: definitions, ranges, and where they are not defined."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from trainers.from_scratch.task import name_undefined
from trainers.metrics.image_quality import (
    confusion_metrics,
    coverage,
    distribution_metrics,
    kernel_distance,
    psnr,
    sharpness,
    ssim,
)
from trainers.metrics.lora_quality import nearest_photos


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def features(n, seed, width=8, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(n, width, generator=generator)


def as_pictures(x):
    return x[:, :, None, None]


def reference_ssim(x, y):
    """scikit-image's structural_similarity of one channel in 0..1, with Wang's Gaussian weights."""

    def blur(a):
        return gaussian_filter(a, 1.5, truncate=3.5, mode="reflect")

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (top / bottom)[5:-5, 5:-5].mean()


def test_ssim_is_that_of_pictures_in_0_to_1():
    """Dark pictures, because SSIM compares brightness: on -1..1 it is another number."""
    x = 0.4 * random(3, 1, 24, 30).double()
    y = (x + 0.1 * random(3, 1, 24, 30, seed=1)).clamp(0, 1)
    expected = np.mean(
        [reference_ssim(a[0].numpy(), b[0].numpy()) for a, b in zip(x, y, strict=True)]
    )
    assert ssim(2 * x - 1, 2 * y - 1) == pytest.approx(expected, rel=1e-4)


def test_psnr_does_not_depend_on_where_zero_lies():
    x, y = random(2, 3, 16, 16), random(2, 3, 16, 16, seed=1)
    expected = -10 * math.log10(float((x - y).double().square().mean()))
    assert psnr(2 * x - 1, 2 * y - 1) == pytest.approx(expected, rel=1e-5)


def test_equal_pictures_have_an_infinite_psnr_and_an_ssim_of_one():
    x = 2 * random(2, 3, 16, 16) - 1
    assert psnr(x, x) == math.inf
    assert ssim(x, x) == pytest.approx(1)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_pictures_of_one_value_have_an_ssim_and_no_sharpness(value):
    flat = torch.full((2, 1, 16, 16), value)
    assert ssim(flat, flat) == pytest.approx(1)
    assert math.isnan(sharpness(flat, flat))


def test_pictures_smaller_than_its_window_have_no_ssim():
    x = random(2, 1, 10, 40)
    assert math.isnan(ssim(x, x))
    assert ssim(random(2, 1, 11, 11), random(2, 1, 11, 11)) == pytest.approx(1)


def test_no_pictures_have_no_figures():
    none = torch.zeros(0, 1, 16, 16)
    assert math.isnan(psnr(none, none))
    assert math.isnan(ssim(none, none))


def test_figures_that_are_no_number_are_named():
    figures = {"psnr": math.inf, "ssim": math.nan, "dice": 0.5, "features": "some"}
    assert name_undefined(figures) == {
        "psnr": "infinite",
        "ssim": "not defined on these pictures",
        "dice": 0.5,
        "features": "some",
    }


# Sets of pictures


def test_fid_is_left_out_where_pictures_are_fewer_than_its_features_and_the_figures_say_why():
    few, enough = (
        distribution_metrics(as_pictures(features(n, 0)), as_pictures(features(n, 1)), nn.Flatten())
        for n in (8, 9)
    )
    assert "fid" not in few
    assert "more than 8 pictures" in few["fid_note"]
    assert "8 are compared" in few["fid_note"]
    assert math.isfinite(few["kid"])
    assert math.isfinite(few["kid_standard_error"])
    assert enough["fid"] >= 0
    assert "fid_note" not in enough


def test_the_smaller_of_two_sets_decides_whether_there_is_a_fid():
    large, small = as_pictures(features(50, 0)), as_pictures(features(8, 1))
    for pair in ((large, small), (small, large)):
        metrics = distribution_metrics(*pair, nn.Flatten())
        assert metrics["pictures"] == 8
        assert "fid" not in metrics


def polynomial_kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_kid_of_sets_of_two_sizes_equals_the_sum_over_all_pairs():
    a, b = features(20, 0, mean=0.3).double(), features(31, 1).double()
    aa, bb, ab = polynomial_kernel(a, a), polynomial_kernel(b, b), polynomial_kernel(a, b)
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    assert kernel_distance(a, b)[0] == pytest.approx(float(sum(within) - 2 * ab.mean()))


def test_the_standard_error_of_kid_is_the_jackknife_by_hand():
    a, b = features(7, 0, mean=0.5), features(9, 1)

    def without(x, i):
        return torch.cat([x[:i], x[i + 1 :]])

    leave_a = np.array([kernel_distance(without(a, i), b)[0] for i in range(7)])
    leave_b = np.array([kernel_distance(a, without(b, i))[0] for i in range(9)])
    variance = sum((len(x) - 1) * x.var() for x in (leave_a, leave_b))
    assert kernel_distance(a, b)[1] == pytest.approx(variance**0.5)


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_standard_error_of_kid_is_the_spread_of_repeated_draws(mean):
    draws = [
        kernel_distance(features(40, 2 * i, mean=mean), features(40, 2 * i + 1)) for i in range(200)
    ]
    values, errors = np.array(draws).T
    assert 0.7 * values.std() < errors.mean() < 2 * values.std()


def test_kid_of_one_distribution_is_zero_within_its_error_for_few_pictures_and_for_many():
    for n in (10, 30, 300):
        draws = [kernel_distance(features(n, 2 * i), features(n, 2 * i + 1))[0] for i in range(40)]
        assert abs(np.mean(draws)) < 3 * np.std(draws) / 40**0.5


def test_two_pictures_have_no_kid_and_three_no_third_neighbour():
    assert all(math.isnan(value) for value in kernel_distance(features(2, 0), features(9, 1)))
    assert math.isnan(coverage(features(9, 0), features(3, 1)))
    assert not math.isnan(coverage(features(9, 0), features(4, 1)))


def test_figures_of_large_sets_do_not_depend_on_the_order_of_the_pictures(monkeypatch):
    """Sorted by class, the first part would hold the classes that come first."""
    monkeypatch.setattr("trainers.metrics.image_quality.MAX_PAIRED", 200)
    classes = [features(200, seed, mean=4.0 * seed) for seed in range(4)]
    others = [features(200, 10 + seed, mean=4.0 * seed) for seed in range(4)]
    a, b = torch.cat(classes), torch.cat(others)
    shuffled = b[torch.randperm(len(b), generator=torch.Generator().manual_seed(0))]
    metrics, again = (
        distribution_metrics(as_pictures(a[::3]), as_pictures(x), nn.Flatten())
        for x in (b, shuffled)
    )
    assert metrics["fid"] == pytest.approx(again["fid"], rel=1e-3)
    error = metrics["kid_standard_error"]
    assert abs(metrics["kid"] - again["kid"]) < 3 * error
    assert abs(metrics["recall"] - again["recall"]) < 0.15
    assert metrics["recall"] > 0.6


def test_measuring_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    distribution_metrics(as_pictures(features(20, 0)), as_pictures(features(20, 1)), nn.Flatten())
    assert torch.equal(torch.rand(3), expected)


# Masks


def test_masks_that_are_ignored_altogether_have_no_error():
    truth = torch.full((2, 4, 4), 255)
    metrics = confusion_metrics(torch.zeros_like(truth), truth, 2, 255)
    assert metrics == {"dice_0": 1, "dice_1": 1, "iou_0": 1, "iou_1": 1, "pixel_error": 0}


# Near-copies of photos


def test_a_photo_that_is_there_twice_hides_no_copy():
    """A flag is: nearer than the two photos that are nearest to each other."""
    photos = torch.eye(4)[[0, 1, 1]]
    copy = torch.tensor([[1.0, 0.1, 0, 0]]) / 1.01**0.5
    assert nearest_photos(copy, photos)[2].tolist() == [True]
    assert nearest_photos(copy, photos[1:])[2].tolist() == [False]
