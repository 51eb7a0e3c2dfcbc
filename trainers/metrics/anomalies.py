"""How well pixels with defects are told from good ones.

Maps (N, H, W) are higher where something is strange; masks are boolean and of that shape.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainers.metrics.image_quality import auroc

PRO_LIMIT = 0.3  # share of good pixels that may be taken for defects, as Bergmann et al. have it


def pixel_auroc(maps: Tensor, masks: Tensor) -> float:
    """AUROC over all pixels of all pictures; NaN where none, or every one, is of a defect."""
    return auroc(masks.flatten(), maps.flatten())


def per_region_overlap(maps: Tensor, masks: Tensor, limit: float = PRO_LIMIT) -> float:
    """PRO (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", 5.3): 0..1, 1 is best.

    The share of each defect that is found, averaged over defects however large they are, against
    the share of good pixels above the same threshold: the area under that curve up to `limit`,
    divided by it. A defect is a region of pixels that touch, also at corners. NaN without defects
    or without good pixels.
    """
    from scipy.ndimage import label

    masks = masks.cpu().numpy()
    found = np.zeros(masks.shape)  # what a pixel above the threshold adds to the share found
    count = 0
    for mask, shares in zip(masks, found, strict=True):
        regions, regions_here = label(mask, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel())
        shares[mask] = 1 / sizes[regions[mask]]
        count += regions_here
    if not count or masks.all():
        return float("nan")
    false = ~masks / (~masks).sum()
    return area_up_to(limit, maps.cpu().numpy().ravel(), false.ravel(), found.ravel() / count)


def area_up_to(limit: float, scores: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """The area under the curve of the sums of x and y over all scores above a threshold that falls,
    up to x = limit, divided by it. Pixels of one score pass the threshold together."""
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)
    x, y = (np.append(0, part[order].cumsum()[is_last]) for part in (x, y))
    at_limit = np.interp(limit, x, y)
    inside = x < limit
    x, y = np.append(x[inside], limit), np.append(y[inside], at_limit)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / limit)
