"""Defects in textures and a part: what an autoencoder's run tells, beside scikit-learn's detectors.

python scripts/results/anomaly.py [--out runs/results] [--seeds 0 1 2] [--subjects brick ...]

Each detector is shown the same good pictures and judged by the same rule; the sizes of those that
can use more time are such that they take about as many processor seconds as ours, or all patches.
See docs/results.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import print_table, read_or_compute
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from textures import DEFECTS, SUBJECTS, write_subject

from trainers.cli import make_parser, run_main, silence_libraries
from trainers.config.loading import load_config
from trainers.from_scratch.anomaly_scores import PatchScorer
from trainers.from_scratch.patch_memory import STRIDE, raw_patches
from trainers.metrics.anomalies import per_region_overlap, pixel_auroc
from trainers.metrics.image_quality import auroc
from trainers.run import run
from trainers.run_folder import FIGURES_NAME

CONFIG = "configs/autoencoder_defects.yaml"
# what each of our rows changes in the config
OURS = {
    "patches": [],
    "reconstruction": ["validation.scorer=reconstruction"],
    "untrained": ["train.max_train_steps=1", "optimizer.learning_rate=1e-9"],
}
OF_LOF, TREES = 8000, 500  # patches that LOF is fitted on; of the isolation forest
COMPONENTS = 32  # of PCA

FIGURES = ("auroc", *(f"auroc_{kind}" for kind in DEFECTS), "pixel_auroc", "pro")

Figures = dict[str, float]
Scoring = Callable[[np.ndarray], np.ndarray]


@dataclass
class Pictures:
    """Patches (N, n, n, 64) of the good pictures to learn from, of good ones and of those with
    defects by kind, to measure with; masks (N, S, S) by kind."""

    train: np.ndarray
    good: np.ndarray
    bad: dict[str, np.ndarray]
    masks: dict[str, torch.Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "The folder for pictures and runs."
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help=help)
    help = "Seeds of the pictures and of our runs."
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=help)
    help = "What is pictured."
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    torch.set_num_threads(1)
    rows = []
    for subject in arguments.subjects:
        by_name: dict[str, list[Figures]] = {}
        for seed in arguments.seeds:
            folder = arguments.out / f"anomaly_{subject}_seed{seed}"
            for name, found in compare_all(subject, seed, folder):
                by_name.setdefault(name, []).append(found)
        for name, found in by_name.items():
            rows.append([subject, name, *mean_and_spread(found)])
    columns = ["seconds", "AUROC", *DEFECTS, "pixel AUROC", "PRO"]
    print_table(["subject", "detector", *columns], rows)


def compare_all(subject: str, seed: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    """Figures by the name of the detector; finished ones are read again."""
    data = write_subject(subject, seed, folder / "pictures")
    for name, overrides in OURS.items():
        path = folder / f"{name}.json"
        run_folder = folder / ("untrained" if name == "untrained" else "run")
        options = [f"data.image_dir={data}", f"seed={seed}", f"output_dir={run_folder}"]
        every = [*options, *overrides]
        yield f"ours, {name}", read_or_compute(path, lambda every=every: run_ours(every))
    for name, make in DETECTORS.items():
        path = folder / f"{name.split()[0].strip(',')}.json"
        yield name, read_or_compute(path, lambda make=make: run_detector(make, data))


def run_ours(overrides: list[str]) -> Figures:
    """The figures of a run, from its start to its report. A second scorer measures the finished run
    of the first, whose seconds are not counted again."""
    config = load_config(CONFIG, overrides)
    begin = time.process_time()
    run(config)
    seconds = time.process_time() - begin
    found = json.loads((config.output_dir / FIGURES_NAME).read_text())
    return {"seconds": seconds, **{name: found[name] for name in FIGURES}}


def read_pictures(data: Path) -> Pictures:
    def read(place: str) -> torch.Tensor:
        arrays = [np.array(Image.open(path)) for path in sorted((data / place).iterdir())]
        return torch.from_numpy(np.stack(arrays))[:, None]

    def patches(place: str) -> np.ndarray:
        x = read(place).float() / 127.5 - 1
        return raw_patches(x, x.shape[-1] // STRIDE).permute(0, 2, 3, 1).numpy()

    masks = {kind: read(f"ground_truth/{kind}")[:, 0] > 0 for kind in DEFECTS}
    bad = {kind: patches(f"test/{kind}") for kind in DEFECTS}
    return Pictures(patches("train/good"), patches("test/good"), bad, masks)


def run_detector(make: Callable[[np.ndarray], Scoring], data: Path) -> Figures:
    """The figures of a detector on raw patches, with the processor seconds to fit and to score."""
    pictures = read_pictures(data)
    patches = pictures.train.reshape(-1, pictures.train.shape[-1])
    order = np.random.default_rng(0).permutation(len(patches))
    begin = time.process_time()
    found = measure(make(patches[order]), pictures)
    return {"seconds": time.process_time() - begin, **found}


def measure(score: Scoring, pictures: Pictures) -> Figures:
    """By the rule of ours: maps of the size of the picture, the mean of the strangest share."""

    def maps(patches: np.ndarray) -> torch.Tensor:
        values = score(patches.reshape(-1, patches.shape[-1])).reshape(patches.shape[:3])
        side = STRIDE * patches.shape[1]
        small = torch.from_numpy(values).float()[:, None]
        return F.interpolate(small, (side, side), mode="bilinear")[:, 0]

    def decide(values: torch.Tensor) -> torch.Tensor:
        places = values.flatten(1)
        return places.topk(round(PatchScorer.top_share * places.shape[1])).values.mean(1)

    good, bad = maps(pictures.good), {kind: maps(x) for kind, x in pictures.bad.items()}
    all_bad = torch.cat(list(bad.values()))

    def tell(strange: torch.Tensor) -> float:
        is_bad = torch.arange(len(good) + len(strange)) >= len(good)
        return auroc(is_bad, torch.cat([decide(good), decide(strange)]))

    masks = torch.cat([torch.zeros(good.shape, dtype=torch.bool), *pictures.masks.values()])
    values = torch.cat([good, all_bad])
    return {
        "auroc": tell(all_bad),
        **{f"auroc_{kind}": tell(strange) for kind, strange in bad.items()},
        "pixel_auroc": pixel_auroc(values, masks),
        "pro": per_region_overlap(values, masks),
    }


def nearest_raw(patches: np.ndarray) -> Scoring:
    fitted = NearestNeighbors(n_neighbors=1).fit(patches)
    return lambda queries: fitted.kneighbors(queries)[0][:, 0]


def pca_residual(patches: np.ndarray) -> Scoring:
    fitted = PCA(COMPONENTS, random_state=0).fit(patches)

    def residual(queries: np.ndarray) -> np.ndarray:
        again = fitted.inverse_transform(fitted.transform(queries))
        return ((again - queries) ** 2).mean(1)

    return residual


def isolation_forest(patches: np.ndarray) -> Scoring:
    fitted = IsolationForest(n_estimators=TREES, random_state=0).fit(patches)
    return lambda queries: -fitted.score_samples(queries)


def local_outlier_factor(patches: np.ndarray) -> Scoring:
    fitted = LocalOutlierFactor(novelty=True).fit(patches[:OF_LOF])
    return lambda queries: -fitted.score_samples(queries)


DETECTORS = {
    "kNN, all raw patches": nearest_raw,
    f"PCA of raw patches, {COMPONENTS} components": pca_residual,
    f"IsolationForest of raw patches, {TREES} trees": isolation_forest,
    f"LOF, {OF_LOF} raw patches": local_outlier_factor,
}


def mean_and_spread(found: list[Figures]) -> list[str]:
    cells = [f"{np.mean([figures['seconds'] for figures in found]):.1f}"]
    for name in FIGURES:
        values = [figures[name] for figures in found]
        cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
    return cells


if __name__ == "__main__":
    sys.exit(run_main(main))
