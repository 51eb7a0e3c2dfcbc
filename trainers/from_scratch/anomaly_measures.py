"""What a run that is for anomalies measures, shows and keeps of its model as that now is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float, to_pil
from trainers.data.rng import choose_among, choose_rows, derive_seed
from trainers.from_scratch.anomaly_figures import Figures, ScoredPictures
from trainers.from_scratch.anomaly_scores import PatchScorer, ReconstructionScorer, Scorer
from trainers.from_scratch.anomaly_verdicts import Judge
from trainers.from_scratch.defects import Defects
from trainers.from_scratch.heat_maps import color_maps
from trainers.from_scratch.image_sets import ImageSet
from trainers.from_scratch.networks import ConvAutoencoder

MAX_SHOWN_KINDS = 6  # of defects
MAX_SCALE_PICTURES = 100  # learnt ones, by which heat maps are scaled where none are held out

GridRow = tuple[str, list[Image.Image]]


class AnomalyMeasures:
    """test: held-out pictures, of which those of the class that was learnt are good; None where
    nothing is held out. defects: pictures to measure with, if there are any."""

    def __init__(
        self,
        config: AutoencoderConfig,
        train: ImageSet,
        test: ImageSet | None,
        defects: Defects | None,
    ) -> None:
        self.config, self.train, self.test, self.defects = config, train, test, defects
        self.made_of: str | None = None  # the digest of the weights that these are of
        self.scorer: Scorer | None = None
        self.judge: Judge | None = None

    @property
    def can_tell(self) -> bool:
        """Whether there are strange pictures to measure with."""
        return self.defects is not None or self.config.data.label_column is not None

    def scorer_of(self, model: ConvAutoencoder) -> Scorer:
        """A function of the weights, the training pictures and the seed, made once for them."""
        digest = weights_digest(model)
        if digest != self.made_of:
            self.made_of, self.judge = digest, None
            if self.config.validation.scorer == PatchScorer.name:
                self.scorer = PatchScorer.build(model, self.train, self.config)
            else:
                self.scorer = ReconstructionScorer(model, self.config)
        return self.scorer

    def judge_of(self, model: ConvAutoencoder) -> Judge:
        """That scorer, with its threshold by all good pictures that are held out."""
        scorer = self.scorer_of(model)
        if self.judge is None:
            seed = derive_seed(self.config.seed, "scale")
            rows = choose_rows(seed, len(self.train), MAX_SCALE_PICTURES)
            learnt, good_rows = to_float(self.train.take(rows)), self.good_rows()
            good = to_float(self.test.take(good_rows)) if good_rows else learnt[:0]
            quantile = self.config.validation.threshold_quantile
            self.judge = Judge.calibrate(scorer, good, learnt, quantile)
        return self.judge

    def good_rows(self) -> list[int]:
        """Of the held-out pictures."""
        if self.test is None:
            return []
        return self.is_good(range(len(self.test))).nonzero()[:, 0].tolist()

    def is_good(self, rows: Sequence[int]) -> Tensor:
        """(B,) which of these held-out pictures are of the class that was learnt."""
        return self.test.take_labels(rows) == self.train.labels[0]

    def compare(
        self, model: ConvAutoencoder, x: Tensor, is_good: Tensor, count: int
    ) -> ScoredPictures:
        """Held-out pictures x, and `count` of those with defects, always the same."""
        seed, defects = derive_seed(self.config.seed, "validation"), self.defects
        rows = choose_rows(seed, len(defects.images), count) if defects else ()
        return ScoredPictures(self.scorer_of(model), x[is_good], x[~is_good], defects, rows)

    def final_figures(self, model: ConvAutoencoder, x: Tensor, is_good: Tensor) -> Figures:
        """Of all held-out pictures x and all with defects; found: the share above the threshold."""
        judge, figures = self.judge_of(model), {}
        if self.can_tell:
            count = len(self.defects.images) if self.defects else 0
            scored = self.compare(model, x, is_good, count)
            figures = scored.figures()
            if judge.threshold is not None:
                figures["found"] = float((scored.strange > judge.threshold).double().mean())
        if judge.threshold is not None:
            figures["threshold"] = judge.threshold
        return figures | {"threshold_note": judge.threshold_note}

    def grid_rows(self, model: ConvAutoencoder, good: Tensor) -> Iterator[GridRow]:
        """How strange good pictures are, and strange ones of each kind; all on one scale."""
        judge = self.judge_of(model)

        def heat(x: Tensor) -> list[Image.Image]:
            return color_maps(judge.scorer.maps(x), judge.scale)

        yield "how strange each place is", heat(good)
        for title, x, masks in self.strange_pictures(len(good)):
            yield title, to_pil(x)
            yield f"{title}: how strange each place is", heat(x)
            if masks.any():
                yield f"{title}: where the defect is", to_pil(2 * masks[:, None].float() - 1)

    def strange_pictures(self, count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Some of each kind, with masks; always the same."""
        seed = derive_seed(self.config.seed, "shown")
        if self.config.data.label_column is not None and self.test is not None:
            others = (~self.is_good(range(len(self.test)))).nonzero()[:, 0].tolist()
            rows = choose_among(seed, others, count)
            if rows:
                x = to_float(self.test.take(rows))
                yield "other classes", x, torch.zeros_like(x[:, 0], dtype=torch.bool)
        if self.defects is None:
            return
        labels = self.defects.images.labels
        for number, kind in enumerate(self.defects.kinds[:MAX_SHOWN_KINDS]):
            rows = (labels == number).nonzero()[:, 0].tolist()
            yield kind, *self.defects.take(choose_among(seed, rows, count))


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
