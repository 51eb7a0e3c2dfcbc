"""How good pictures are. Pictures are (N, C, S, S) in [-1, 1].

A figure that its pictures do not define, such as a mean over none of them, is NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

SSIM_WINDOW = 11  # pixels, of a Gaussian of 1.5 (Wang et al. 2004)
NEIGHBORS = 3  # of the improved precision and recall
# pictures of each set that are compared pair by pair: for KID, precision and recall
MAX_PAIRED = 5000


def psnr(generated: Tensor, true: Tensor) -> float:
    """dB, of the mean squared error over all pictures; infinite for equal ones."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if not len(true):
        return float("nan")
    return float(peak_signal_noise_ratio(generated, true, data_range=2.0))


def ssim(generated: Tensor, true: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over pictures; NaN below 11 pixels.

    It compares brightness, so it depends on where zero lies: pictures are taken to 0..1, as in
    published figures. Like those it counts only places where the whole window lies in the picture.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not len(true) or min(true.shape[2:]) < SSIM_WINDOW:
        return float("nan")
    unit_range = ((x.clamp(-1, 1) + 1) / 2 for x in (generated, true))
    _, places = structural_similarity_index_measure(
        *unit_range, data_range=1.0, reduction="none", return_full_image=True
    )
    edge = SSIM_WINDOW // 2
    return float(places[..., edge:-edge, edge:-edge].mean())


def colorfulness(x: Tensor) -> float:
    """Of RGB pictures on the scale of 0..255: 0 grey, 33 moderate, 82 highly colourful (Hasler and
    Suesstrunk 2003)."""
    r, g, b = ((x + 1) * 127.5).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1).flatten(2)  # (N, 2, S * S)
    return float((opponents.std(2).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)).mean())


def sharpness(generated: Tensor, true: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, relative to the true pictures': below 1 is
    blurred. NaN where all true pictures are of one value each."""

    def edges(x: Tensor) -> Tensor:
        return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()

    if not edges(true) > 0:
        return float("nan")
    return float(edges(generated) / edges(true))


def auroc(is_positive: Tensor, score: Tensor) -> float:
    """Area under the receiver operating characteristic of scores (N,); NaN where all are of one
    kind."""
    from sklearn.metrics import roc_auc_score

    if len(is_positive.unique()) < 2:
        return float("nan")
    return float(roc_auc_score(is_positive.cpu(), score.cpu()))


@torch.no_grad()
def distribution_metrics(
    generated: Tensor, true: Tensor, net: Callable[[Tensor], Tensor]
) -> dict[str, float | str]:
    """How far two sets of pictures are apart, in the features of `net`.

    pictures: of the smaller set; fid (Heusel et al. 2017); kid (Binkowski et al. 2018) and the
    standard error of it; the improved precision and recall (Kynkaanniemi et al. 2019).

    A covariance of D features has full rank only with more than D pictures. With fewer, equal
    distributions have a large FID, so that it is left out, and fid_note tells why; KID has no bias.
    """
    a, b = (
        torch.cat([net(part).float().cpu() for part in x.split(500)]) for x in (generated, true)
    )
    count, num_features = min(len(a), len(b)), a.shape[1]
    metrics: dict[str, float | str] = {"pictures": count}
    if count > num_features:
        metrics["fid"] = frechet_distance(a, b)
    else:
        metrics["fid_note"] = (
            f"not measured: FID needs more than {num_features} pictures, one for each feature, and "
            f"{count} are compared; KID has no bias from their number"
        )
    rng = torch.Generator().manual_seed(0)
    # by chance: data sets are often sorted by class
    a, b = (x[torch.randperm(len(x), generator=rng)[:MAX_PAIRED]] for x in (a, b))
    metrics["kid"], metrics["kid_standard_error"] = kernel_distance(a, b)
    return metrics | {"precision": coverage(a, b), "recall": coverage(b, a)}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of features (N, D) and (M, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = a.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept
        # one process measures
        fid = FrechetInceptionDistance(identity, sync_on_compute=False)
    fid.update(b, real=True)
    fid.update(a, real=False)
    return float(fid.compute())


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID of features (N, D) and (M, D), and its standard error.

    The unbiased estimate over all pairs; the error by leaving out one picture at a time (Arvesen
    1969, the jackknife of two samples). Both are NaN for fewer than three pictures.
    """
    if min(len(a), len(b)) < 3:
        return float("nan"), float("nan")
    a, b = a.double(), b.double()
    aa, bb, ab, ba = (kernel_row_sums(x, y) for x, y in ((a, a), (b, b), (a, b), (b, a)))
    aa, bb = aa - kernel_diagonal(a), bb - kernel_diagonal(b)
    n, m = len(a), len(b)
    across = 2 * ab.sum() / (n * m)
    within_a, within_b = aa.sum() / (n * (n - 1)), bb.sum() / (m * (m - 1))
    without_a = (aa.sum() - 2 * aa) / ((n - 1) * (n - 2)) - 2 * (ab.sum() - ab) / ((n - 1) * m)
    without_b = (bb.sum() - 2 * bb) / ((m - 1) * (m - 2)) - 2 * (ba.sum() - ba) / ((m - 1) * n)
    variance = sum((len(x) - 1) * x.var(correction=0) for x in (without_a, without_b))
    return float(within_a + within_b - across), float(variance.sqrt())


def kernel_row_sums(a: Tensor, b: Tensor) -> Tensor:
    """(N,): of each row of the kernel (a b / D + 1)^3 of a (N, D) and b (M, D)."""
    width = a.shape[1]
    return torch.cat([((part @ b.T / width + 1) ** 3).sum(1) for part in a.split(1000)])


def kernel_diagonal(a: Tensor) -> Tensor:
    return (a.square().mean(1) + 1) ** 3


def coverage(a: Tensor, b: Tensor, k: int = NEIGHBORS) -> float:
    """Share of a (N, D) that lies within the distance to the k-th neighbour of some point of b (M,
    D); NaN where points of b have fewer neighbours."""
    if len(b) <= k:
        return float("nan")
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

    A class that neither is there nor is predicted counts as found, and no pixel as no error.
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
    wrong = counts.sum() - true_positives.sum()
    return metrics | {"pixel_error": float(wrong / counts.sum().clamp(min=1))}
