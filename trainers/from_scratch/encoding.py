"""What a finished autoencoder says of any pictures: codes, scores and, for anomalies, verdicts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float
from trainers.data.pictures import picture_from_file
from trainers.distributed.accelerator import best_device
from trainers.errors import UserError
from trainers.from_scratch.anomaly_verdicts import Judge
from trainers.from_scratch.checks import warn_of_squashing
from trainers.from_scratch.heat_maps import write_heat_map
from trainers.from_scratch.image_sets import ImageSample, ImageSet, decode_sample
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.progress import track
from trainers.run_folder import MODEL

BATCH = 64  # pictures that are encoded at once


@torch.no_grad()
def encode_pictures(
    config: AutoencoderConfig, run: Path, paths: Sequence[Path], maps_folder: Path
) -> tuple[dict[str, list | np.ndarray], Judge | None]:
    """By the model of a finished run: name (N,), code (N, D), score (N,): the mean squared error.

    For anomalies score is how strange a picture is, is_strange (N,) whether that is above the
    threshold, if there is one; heat maps are written into `maps_folder`. Raises: UserError where
    those of two pictures would have one name.
    """
    model = ConvAutoencoder.from_pretrained(run / MODEL).to(best_device())
    judge = None
    if config.use == "anomaly":
        judge = Judge.load(run / MODEL, model, config)
        map_paths = name_maps(paths, maps_folder)
    depth = config.data.bit_depth
    samples = [ImageSample(picture_from_file(path, bit_depth=depth)) for path in paths]
    warn_of_squashing([sample.picture for sample in samples], config)
    decoder = partial(decode_sample, config=config.data, read_target=None)
    images, codes, scores = ImageSet(samples, decoder, False, model.device), [], []
    for first in track(range(0, len(images), BATCH), "encoding"):
        rows = range(first, min(first + BATCH, len(images)))
        x = to_float(images.take(rows))
        codes.append(model.encode(x))
        if judge is None:
            scores.append(((model.decode(codes[-1]).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
            continue
        maps = judge.scorer.maps(x)
        scores.append(judge.scorer.scores(maps))
        for row, values in zip(rows, maps, strict=True):
            picture = samples[row].picture.decode()
            write_heat_map(picture, values, judge.scale, map_paths[row])
    score = torch.cat(scores).cpu().numpy()
    columns = {"name": [str(path) for path in paths], "code": torch.cat(codes).cpu().numpy()}
    columns["score"] = score
    if judge is not None and judge.threshold is not None:
        columns["is_strange"] = score > judge.threshold
    return columns, judge


def name_maps(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The heat map of each picture, in sub-folders as the pictures are.

    Raises: UserError where two pictures are named alike but for their endings.
    """
    root = os.path.commonpath([path.resolve().parent for path in paths])
    named = [folder / path.resolve().relative_to(root).with_suffix(".png") for path in paths]
    taken: set[Path] = set()
    for name in named:
        if name in taken:
            raise UserError(
                f"the heat maps of several pictures would be called {name}: encode them in two "
                "goes, with another --out"
            )
        taken.add(name)
    return named
