"""Networks whose features compare pictures, from what this machine holds; and figures in such features.

Pictures are (N, 3, S, S) in [-1, 1]; features are (N, D) of unit length, so that a product of two is their cosine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainers.metrics.feature_networks import Net

Row = dict[str, str | int | float | None]  # figures by name, with what they are of


def fidelity(samples: Tensor, photos: Tensor) -> float:
    """Mean cosine of every sample with every photo, -1..1: DINO and CLIP-I of DreamBooth (Ruiz et al. 2023, 4.1)."""
    return float((samples @ photos.T).mean())


def prompt_fidelity(samples: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each sample with its own prompt, -1..1: CLIP-T of DreamBooth (Ruiz et al. 2023, 4.1)."""
    return float((samples * prompts).sum(1).mean())


def drift(tuned: Tensor, base: Tensor) -> float:
    """1 - the mean cosine of pictures with those that the base makes of the same noise, 0..2; 0: nothing has moved."""
    return float((tuned - base).square().sum(1).mean() / 2)


def diversity(samples: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of one prompt's samples, 0..2; NaN for a single one.

    DIV of DreamBooth (Ruiz et al. 2023, 4.1), in these features instead of LPIPS.
    """
    n = len(samples)
    cosines = samples @ samples.T
    return float(1 - (cosines.sum() - cosines.trace()) / (n * (n - 1))) if n > 1 else float("nan")


def nearest_photos(samples: Tensor, photos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample (N,): its nearest training photo's index, their cosine, and whether that is suspiciously near.

    The rule: nearer than the two training photos that are nearest to each other (after Meehan et al. 2020: copying is
    to be nearer to the training set than its own distribution explains). A flag is a reason to look, no proof, least
    of all with few photos. Nothing is flagged by a single one.
    """
    similarity, index = (samples @ photos.T).max(1)
    among = (photos @ photos.T).fill_diagonal_(-1)
    bar = among.max() if len(photos) > 1 else 1.0
    return index, similarity, similarity > bar


def measure(
    nets: Sequence[Net],
    made: dict[str, Tensor],
    base: dict[str, Tensor],
    photos: Tensor,
    prompts: Mapping[str, Sequence[str]],
) -> Row:
    """Figures of one LoRA's pictures; None where there is nothing to measure.

    subject: `fidelity` of "subject" to the photos; clip_i: the same by CLIP, where another net stands first.
    prior_drift, pixel_drift: of "class" from the base's pictures, as `drift`, and as the mean absolute difference of
    the pixels, 0..1. diversity: the mean of `diversity` over the prompts of all other rows; clip_t: their
    `prompt_fidelity` by CLIP.
    """
    net, clip = nets[0], next((net for net in nets if net.read), None)
    asked = [row for row in made if row != "class"]
    words = [prompt for row in asked for prompt in prompts[row]]
    seen = net.pictures(torch.cat([made[row] for row in asked]))
    spread = [diversity(seen[[word == prompt for word in words]]) for prompt in dict.fromkeys(words)]
    spread = [value for value in spread if not math.isnan(value)]
    row: Row = {"subject": fidelity(net.pictures(made["subject"]), net.pictures(photos))}
    row |= {"prior_drift": None, "pixel_drift": None, "diversity": sum(spread) / len(spread) if spread else None}
    if "class" in made:
        row["prior_drift"] = drift(net.pictures(made["class"]), net.pictures(base["class"]))
        row["pixel_drift"] = float((made["class"] - base["class"]).abs().mean() / 2)
    if clip and clip is not net:
        row["clip_i"] = fidelity(clip.pictures(made["subject"]), clip.pictures(photos))
    if clip:
        row["clip_t"] = prompt_fidelity(clip.pictures(torch.cat([made[row] for row in asked])), clip.prompts(words))
    return row


def best(rows: Sequence[Row]) -> Row:
    """The highest subject - prior_drift, both being differences of cosines; the earliest of equals."""
    return max(rows, key=lambda row: row["subject"] - (row["prior_drift"] or 0.0))


def memorisation(net: Net, made: Mapping[str, Tensor], photos: Tensor) -> list[Row]:
    """`nearest_photos` of the final LoRA's samples, by the files in the run folder that show them."""
    known, found = net.pictures(photos), []
    for row, x in made.items():
        for i, (photo, similarity, flagged) in enumerate(zip(*nearest_photos(net.pictures(x), known), strict=True)):
            shown = {
                "sample": f"evaluation/final/{row}-{i:02d}.png",
                "photo": f"evaluation/photos/photo-{photo:02d}.png",
            }
            found.append({**shown, "similarity": float(similarity), "flagged": bool(flagged)})
    return found
