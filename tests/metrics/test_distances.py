"""FID, KID, precision, recall and class balance equal their closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from trainers.from_scratch.balance import class_balance
from trainers.metrics.image_quality import coverage, distribution_metrics


class Points(nn.Module):
    """Pictures (N, D, 1, 1) are their own features."""

    def forward(self, x):
        return x.flatten(1)


def points(mean=0.0, scale=1.0, n=300, seed=0):
    return mean + scale * torch.randn(n, 5, 1, 1, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_have_no_distance_and_cover_each_other():
    metrics = distribution_metrics(points(), points(), Points())
    assert metrics["fid"] == pytest.approx(0, abs=1e-4)
    assert metrics["kid"] == pytest.approx(0, abs=0.1)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)


def test_fid_and_kid_equal_their_closed_forms():
    generated, true = points(0.3, 1.2), points(seed=1) @ torch.eye(1)
    metrics = distribution_metrics(generated, true, Points())
    a, b = (x.flatten(1).double().numpy() for x in (generated, true))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    fid = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert metrics["fid"] == pytest.approx(fid, rel=1e-4)
    aa, bb, ab = ((x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n = len(a)
    kid = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (aa, bb)) - 2 * ab.mean()
    assert metrics["kid"] == pytest.approx(kid, rel=1e-3)


def test_what_is_never_made_costs_recall_and_what_does_not_exist_precision():
    one, both = points(), torch.cat([points(seed=1)[:150], points(50, seed=2)[:150]])
    dropped, invented = (
        distribution_metrics(one, both, Points()),
        distribution_metrics(both, one, Points()),
    )
    assert dropped["precision"] > 0.9
    assert dropped["recall"] < 0.6
    assert (invented["precision"], invented["recall"]) == pytest.approx(
        (dropped["recall"], dropped["precision"])
    )
    assert distribution_metrics(one, points(50, seed=2), Points())["precision"] == 0


@pytest.mark.parametrize("k", [1, 3])
def test_inside_equals_a_search_by_hand(k):
    a, b = points(0.8, n=90).flatten(1), points(seed=1, n=110).flatten(1)
    distance = np.linalg.norm(b[:, None].numpy() - b[None].numpy(), axis=-1)
    radius = np.sort(distance, axis=1)[:, k]  # the 0th is the point itself
    hits = [
        any(np.linalg.norm(p - q) <= r for q, r in zip(b.numpy(), radius, strict=True))
        for p in a.numpy()
    ]
    assert coverage(a, b, k) == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1


class Levels(nn.Module):
    """A known classifier: a picture's class is its brightness, -1 for class 0 up to 1 for class
    4."""

    config = SimpleNamespace(classes=5)

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] - torch.linspace(-1, 1, 5)).square()


def test_balance_counts_the_classes_that_are_made():
    counts = [5, 1, 0, 74, 20]
    generated = torch.cat([torch.full((n, 1, 4, 4), -1 + k / 2) for k, n in enumerate(counts)])
    metrics = class_balance(generated[torch.randperm(100)], Levels())
    assert metrics == pytest.approx({"modes": 3, "least_share": 0, "most_share": 0.74 * 5})
    even = class_balance(
        generated.new_tensor([-1, -0.5, 0, 0.5, 1])[:, None, None, None].expand(5, 1, 4, 4),
        Levels(),
    )
    assert even == pytest.approx({"modes": 5, "least_share": 1, "most_share": 1})
