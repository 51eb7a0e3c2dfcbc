"""How good pictures are. Pictures are (N, C, S, S) in [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def psnr(generated: Tensor, true: Tensor) -> float:
    """dB, of the mean squared error over all pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(generated, true, data_range=2.0))


def ssim(generated: Tensor, true: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over pictures."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(generated, true, data_range=2.0))


def colorfulness(x: Tensor) -> float:
    """Of RGB pictures on the scale of 0..255: 0 grey, 33 moderate, 82 highly colourful (Hasler and
    Suesstrunk 2003)."""
    r, g, b = ((x + 1) * 127.5).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1).flatten(2)  # (N, 2, S * S)
    return float((opponents.std(2).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)).mean())


def sharpness(generated: Tensor, true: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, relative to the true pictures': below 1 is
    blurred."""

    def edges(x: Tensor) -> Tensor:
        return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()

    return float(edges(generated) / edges(true))


@torch.no_grad()
def distribution_metrics(
    generated: Tensor, true: Tensor, net: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """fid (Heusel et al. 2017) and kid (Binkowski et al. 2018), both in the features of `net`, and
    the improved precision and recall with k = 3 (Kynkaanniemi et al. 2019)."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (torch.cat([net(part) for part in x.split(500)]) for x in (generated, true))
    identity = nn.Identity()
    identity.num_features = a.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept
        options = {"sync_on_compute": False}  # one process measures
        fid = FrechetInceptionDistance(identity, **options)
        kid = KernelInceptionDistance(identity, 20, min(1000, len(a), len(b)), **options)
    for metric in (fid, kid):  # their sums are kept on the CPU, in double precision
        metric.update(b.cpu(), real=True)
        metric.update(a.cpu(), real=False)
    torch.manual_seed(0)  # of the subsets
    metrics = {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
    a, b = a[:5000], b[:5000]
    return metrics | {"precision": coverage(a, b), "recall": coverage(b, a)}


def coverage(a: Tensor, b: Tensor, k: int = 3) -> float:
    """Share of a (N, D) that lies within the distance to the k-th neighbour of some point of b (M,
    D)."""
    radius = torch.cat([torch.cdist(part, b).kthvalue(k + 1).values for part in b.split(1000)])
    return float(
        torch.cat([(torch.cdist(part, b) <= radius).any(1) for part in a.split(1000)])
        .float()
        .mean()
    )


def confusion_metrics(
    predicted: Tensor, truth: Tensor, classes: int, ignored: int
) -> dict[str, float]:
    """dice_K and iou_K of each class K, and pixel_error, over all pixels but those of the class
    `ignored`.

    A class that neither is there nor is predicted counts as found.
    """
    known = truth != ignored
    counts = torch.bincount(truth[known] * classes + predicted[known], minlength=classes**2).view(
        classes, classes
    )
    true_positives, sizes = counts.diag().double(), (counts.sum(0) + counts.sum(1)).double()
    metrics = {
        f"dice_{k}": float(value)
        for k, value in enumerate((2 * true_positives / sizes).nan_to_num(1))
    }
    metrics |= {
        f"iou_{k}": float(value)
        for k, value in enumerate((true_positives / (sizes - true_positives)).nan_to_num(1))
    }
    return metrics | {"pixel_error": float(1 - true_positives.sum() / counts.sum())}
