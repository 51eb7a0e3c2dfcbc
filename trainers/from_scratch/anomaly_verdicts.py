"""From which score on a picture is called strange, kept beside the model with all that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainers.config import AutoencoderConfig
from trainers.errors import UserError
from trainers.from_scratch.anomaly_scores import PatchScorer, ReconstructionScorer, Scorer
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.patch_memory import PatchMemory
from trainers.tensor_file import read_header, write_tensors

SCORER_NAME = "anomaly.safetensors"  # in the folder of the model
GOOD_SCORES, SCALE = "good_scores", "scale"
# of the places of good pictures: the share that a heat map shows at most half as hot as it can
COOL_SHARE = 0.999


@dataclass(frozen=True)
class Judge:
    """A scorer, and what it makes of good pictures that were not learnt.

    good_scores: (N,) of these, on the CPU, ascending; empty where none are held out. quantile: of
    them, which is the threshold. scale: values (2,) of a map from which on it is shown as warm,
    and as hottest.
    """

    scorer: Scorer
    good_scores: Tensor
    quantile: float
    scale: Tensor

    @classmethod
    def calibrate(cls, scorer: Scorer, good: Tensor, learnt: Tensor, quantile: float) -> Judge:
        """good: pictures that are held out (N, C, S, S), maybe none; learnt: some that are not, by
        which heat maps are scaled then."""
        maps = scorer.maps(good if len(good) else learnt)
        scores = scorer.scores(maps).sort().values[: len(good)].cpu()
        places = maps.flatten().sort().values
        low = places[len(places) // 2]
        cool = places[int(COOL_SHARE * (len(places) - 1))]
        return cls(scorer, scores, quantile, torch.stack([low, 2 * cool - low]))

    @property
    def threshold(self) -> float | None:
        """The score above which a picture is strange; None where no good pictures are held out."""
        if not len(self.good_scores):
            return None
        return float(torch.quantile(self.good_scores, self.quantile))

    @property
    def threshold_note(self) -> str:
        """What the threshold is, and the least share of false alarms that so few can tell."""
        count = len(self.good_scores)
        if not count:
            return "none: no good pictures are held out"
        return (
            f"the {self.quantile:g} quantile of the scores of {count} held-out good pictures; so "
            f"many tell no share of false alarms below {1 / (count + 1):.2g}"
        )

    def save(self, folder: Path) -> None:
        tensors = {
            **self.scorer.tensors(),
            GOOD_SCORES: self.good_scores,
            SCALE: self.scale,
        }
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"scorer": self.scorer.name, "quantile": repr(self.quantile)}
        write_tensors(state, folder / SCORER_NAME, metadata)

    @classmethod
    def load(cls, folder: Path, model: ConvAutoencoder, config: AutoencoderConfig) -> Judge:
        """Of a finished run's folder `model`. Raises: UserError where there is none in it."""
        path = folder / SCORER_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: there is no such file, by which this run tells what is strange: an "
                "earlier version trained it. The same command as in training writes it"
            )
        file = read_header(path)
        tensors = {name: tensor.to(model.device) for name, tensor in file.load()}
        scorer: Scorer = ReconstructionScorer(model, config)
        if file.metadata["scorer"] == PatchScorer.name:
            scorer = PatchScorer(model, PatchMemory.from_tensors(tensors))
        quantile = float(file.metadata["quantile"])
        return cls(scorer, tensors[GOOD_SCORES], quantile, tensors[SCALE])
