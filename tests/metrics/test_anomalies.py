"""AUROC of pixels and PRO equal scikit-learn and the definition, threshold by threshold."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import roc_auc_score

from trainers.metrics.anomalies import per_region_overlap, pixel_auroc


def scored_pictures(levels=None):
    """Maps (3, 12, 12) and masks with three regions, two of which touch at a corner alone.

    levels: how many different scores there are.
    """
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 12, 12), bool)
    masks[0, 1:3, 1:3] = masks[0, 3:7, 3:5] = True
    masks[1, 8:12, 2:11] = masks[1, 2, 2] = True
    maps = rng.random(masks.shape) + 0.5 * masks * rng.random(masks.shape)
    if levels:
        maps = np.floor(levels * maps)
    return torch.from_numpy(maps), torch.from_numpy(masks)


def reference_pro(maps, masks, limit):
    """By its definition: a loop over all thresholds, the trapezoids up to the limit."""
    maps, masks = maps.numpy(), masks.numpy()
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        overlaps = []
        for scores, mask in zip(maps, masks, strict=True):
            regions, count = label(mask, np.ones((3, 3)))
            overlaps += [(scores[regions == i] >= threshold).mean() for i in range(1, count + 1)]
        points.append(((maps[~masks] >= threshold).mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, limit)
        if x1 > x0 and end > x0:
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (y0 + y_end) / 2 * (end - x0)
    return area / limit


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_pro_is_its_definition_also_where_scores_are_equal(levels, limit):
    maps, masks = scored_pictures(levels)
    assert per_region_overlap(maps, masks, limit) == pytest.approx(
        reference_pro(maps, masks, limit)
    )


def test_a_small_defect_counts_as_much_as_a_large_one():
    _, masks = scored_pictures()
    only_the_smallest, only_the_largest = masks.clone(), masks.clone()
    only_the_smallest[0] = only_the_smallest[1, 8:] = False
    only_the_largest[0] = only_the_largest[1, 2, 2] = False
    smallest, largest = (
        per_region_overlap(part.double(), masks) for part in (only_the_smallest, only_the_largest)
    )
    assert smallest == pytest.approx(largest)


def test_perfect_maps_have_one_and_constant_ones_what_chance_gives():
    _, masks = scored_pictures()
    assert per_region_overlap(masks.double(), masks) == pytest.approx(1)
    assert per_region_overlap(torch.zeros(masks.shape), masks) == pytest.approx(0.15)


def test_auroc_of_pixels_is_sklearns():
    maps, masks = scored_pictures(5)
    expected = roc_auc_score(masks.flatten(), maps.flatten())
    assert pixel_auroc(maps, masks) == pytest.approx(expected)


def test_no_defect_has_no_figure():
    maps, masks = scored_pictures()
    for same in (torch.zeros_like(masks), torch.ones_like(masks)):
        assert math.isnan(pixel_auroc(maps, same))
        assert math.isnan(per_region_overlap(maps, same))
