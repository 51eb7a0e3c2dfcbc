"""Networks whose features compare pictures, from what this machine holds; and figures in such
features.

Pictures are (N, 3, S, S) in [-1, 1]; features are (N, D) of unit length, so that a product of two
is their cosine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainers.metrics.feature_networks import FeatureNetwork

SUBJECT_LESS_DRIFT = "subject - prior_drift"  # by which evaluate chooses the best
SAME_PHOTO = 1 - 1e-5  # cosine from which two photos are one

MetricsRow = dict[str, str | int | float | None]  # figures by name, with what they are of


def fidelity(samples: Tensor, photos: Tensor) -> float:
    """Mean cosine of every sample with every photo, -1..1: DINO and CLIP-I of DreamBooth (Ruiz et
    al. 2023, 4.1)."""
    return float((samples @ photos.T).mean())


def prompt_fidelity(samples: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each sample with its own prompt, -1..1: CLIP-T of DreamBooth (Ruiz et al.
    2023, 4.1)."""
    return float((samples * prompts).sum(1).mean())


def drift(tuned: Tensor, base: Tensor) -> float:
    """1 - the mean cosine of pictures with those that the base makes of the same noise, 0..2; 0:
    nothing has moved."""
    return float((tuned - base).square().sum(1).mean() / 2)


def diversity(samples: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of one prompt's samples, 0..2; NaN for a single one.

    DIV of DreamBooth (Ruiz et al. 2023, 4.1), in these features instead of LPIPS.
    """
    n = len(samples)
    cosines = samples @ samples.T
    return float(1 - (cosines.sum() - cosines.trace()) / (n * (n - 1))) if n > 1 else float("nan")


def nearest_photos(samples: Tensor, photos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample (N,): its nearest training photo's index, their cosine, and whether that is
    suspiciously near.

    The rule: nearer than the two training photos that are nearest to each other (after Meehan et
    al. 2020: copying is to be nearer to the training set than its own distribution explains). A
    flag is a reason to look, no proof, least of all with few photos. Nothing is flagged by a single
    one. A photo that is there twice counts once, or nothing could be nearer.
    """
    similarity, index = (samples @ photos.T).max(1)
    photo_similarity = (photos @ photos.T).fill_diagonal_(-1)
    different = photo_similarity[photo_similarity < SAME_PHOTO]
    threshold = different.max() if len(photos) > 1 and different.max() > -1 else 1.0
    return index, similarity, similarity > threshold


def lora_metrics(
    networks: Sequence[FeatureNetwork],
    generated: dict[str, Tensor],
    base: dict[str, Tensor],
    photos: Tensor,
    prompts: Mapping[str, Sequence[str]],
) -> MetricsRow:
    """Figures of one LoRA's pictures; None where there is nothing to measure.

    subject: `fidelity` of "subject" to the photos; clip_i: the same by CLIP, where another net
    stands first.
    prior_drift, pixel_drift: of "class" from the base's pictures, as `drift`, and as the mean
    absolute difference of the pixels, 0..1. diversity: the mean of `diversity` over the prompts of
    all other rows; clip_t: their
    `prompt_fidelity` by CLIP.
    """
    network = networks[0]
    clip = next((network for network in networks if network.text_features), None)
    prompted_rows = [row for row in generated if row != "class"]
    row_prompts = [prompt for row in prompted_rows for prompt in prompts[row]]
    features = network.encode_pictures(torch.cat([generated[row] for row in prompted_rows]))
    diversities = [
        diversity(features[[row_prompt == prompt for row_prompt in row_prompts]])
        for prompt in dict.fromkeys(row_prompts)
    ]
    diversities = [value for value in diversities if not math.isnan(value)]
    subject = network.encode_pictures(generated["subject"])
    row: MetricsRow = {
        "subject": fidelity(subject, network.encode_pictures(photos)),
        "prior_drift": None,
        "pixel_drift": None,
        "diversity": sum(diversities) / len(diversities) if diversities else None,
    }
    if "class" in generated:
        row["prior_drift"] = drift(
            network.encode_pictures(generated["class"]), network.encode_pictures(base["class"])
        )
        row["pixel_drift"] = float((generated["class"] - base["class"]).abs().mean() / 2)
    if clip and clip is not network:
        row["clip_i"] = fidelity(
            clip.encode_pictures(generated["subject"]), clip.encode_pictures(photos)
        )
    if clip:
        row["clip_t"] = prompt_fidelity(
            clip.encode_pictures(torch.cat([generated[row] for row in prompted_rows])),
            clip.encode_prompts(row_prompts),
        )
    return row


def best_row(rows: Sequence[MetricsRow]) -> MetricsRow:
    """The highest subject - prior_drift; the earliest of equals."""
    return max(rows, key=subject_less_drift)


def subject_less_drift(row: MetricsRow) -> float:
    """Likeness less drift, both being differences of cosines."""
    return row["subject"] - (row["prior_drift"] or 0.0)


def find_memorization(
    network: FeatureNetwork, generated: Mapping[str, Tensor], photos: Tensor
) -> list[MetricsRow]:
    """`nearest_photos` of the final LoRA's samples, by the files in the run folder that show
    them."""
    photo_features, result = network.encode_pictures(photos), []
    for row, x in generated.items():
        for i, (photo, similarity, flagged) in enumerate(
            zip(*nearest_photos(network.encode_pictures(x), photo_features), strict=True)
        ):
            files = {
                "sample": f"evaluation/final/{row}-{i:02d}.png",
                "photo": f"evaluation/photos/photo-{photo:02d}.png",
            }
            result.append({**files, "similarity": float(similarity), "flagged": bool(flagged)})
    return result
