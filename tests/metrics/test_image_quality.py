"""Scores of pictures and masks equal scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score

from tests.shared.unets import random
from trainers.metrics.image_quality import colorfulness, confusion_metrics, psnr, sharpness, ssim


def test_dice_and_iou_equal_sklearns():
    truth, generated = (
        torch.randint(4, (3, 20, 20), generator=torch.manual_seed(seed)) for seed in (0, 1)
    )
    generated = torch.where(random(3, 20, 20) < 0.6, truth, generated)
    known = random(3, 20, 20, seed=2) < 0.8
    metrics = confusion_metrics(generated, truth.where(known, 255), 4, 255)
    a, b = truth[known].numpy(), generated[known].numpy()
    for k, (f1, iou) in enumerate(
        zip(f1_score(a, b, average=None), jaccard_score(a, b, average=None), strict=True)
    ):
        assert metrics[f"dice_{k}"] == pytest.approx(f1)
        assert metrics[f"iou_{k}"] == pytest.approx(iou)
    assert metrics["pixel_error"] == pytest.approx((a != b).mean())


def test_psnr_and_ssim_equal_their_closed_forms():
    """Of pictures of one value each, ssim is the comparison of luminance alone, in 0..1."""
    generated, true = torch.full((2, 1, 16, 16), 0.3), torch.full((2, 1, 16, 16), -0.1)
    assert psnr(generated, true) == pytest.approx(10 * math.log10(2**2 / 0.4**2), rel=1e-5)
    c, bright, dark = 0.01**2, 0.65, 0.45
    assert ssim(generated, true) == pytest.approx(
        (2 * bright * dark + c) / (bright**2 + dark**2 + c), rel=1e-4
    )
    x, y = 2 * random(2, 3, 16, 16) - 1, 2 * random(2, 3, 16, 16, seed=1) - 1
    assert psnr(x, y) == pytest.approx(10 * math.log10(4 / np.mean((x - y).numpy() ** 2)), rel=1e-5)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, y) < 0.5


def test_colourfulness_is_hasler_and_suesstrunks():
    assert colorfulness(random(2, 1, 8, 8).expand(2, 3, 8, 8)) == pytest.approx(0, abs=1e-4)
    picture = torch.full((1, 3, 8, 8), -1.0)  # the left half red, the right half blue
    picture[:, 0, :, :4] = picture[:, 2, :, 4:] = 1
    rg, yb = np.array([255.0, 0] * 32), np.array([127.5, -255] * 32)
    expected = np.hypot(rg.std(ddof=1), yb.std(ddof=1)) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert colorfulness(picture) == pytest.approx(expected, rel=1e-5)


def test_a_blurred_picture_is_less_sharp_and_the_true_one_has_sharpness_one():
    x = 2 * random(2, 3, 16, 16) - 1
    assert sharpness(x, x) == pytest.approx(1)
    assert sharpness(F.avg_pool2d(x, 3, 1, 1), x) < 0.5
    assert sharpness(x / 2, x) == pytest.approx(0.5)
