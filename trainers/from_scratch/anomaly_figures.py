"""How well a scorer tells pictures and pixels with defects from good ones, by kind of defect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainers.from_scratch.anomaly_scores import Scorer, count_at_once
from trainers.from_scratch.defects import Defects
from trainers.metrics.anomalies import per_region_overlap, pixel_auroc
from trainers.metrics.image_quality import auroc

Figures = dict[str, float | str]


class ScoredPictures:
    """Maps (N, S, S) and scores (N,) of good pictures, of others that are no good ones, and of the
    pictures with defects at `rows`."""

    def __init__(
        self,
        scorer: Scorer,
        good: Tensor,
        others: Tensor,
        defects: Defects | None,
        rows: Sequence[int],
    ) -> None:
        self.good_maps = scorer.maps(good)
        self.good, self.others = (
            scorer.scores(maps) for maps in (self.good_maps, scorer.maps(others))
        )
        self.defects, self.rows = defects, rows
        maps, masks = [self.good_maps[:0]], []
        at_once = count_at_once(good.shape[-1])
        for first in range(0, len(rows), at_once):
            x, mask = defects.take(rows[first : first + at_once])
            maps.append(scorer.maps(x))
            masks.append(mask)
        self.maps, self.masks = torch.cat(maps), torch.cat(masks) if masks else None
        self.bad = scorer.scores(self.maps)

    @property
    def strange(self) -> Tensor:
        return torch.cat([self.others, self.bad])

    def figures(self) -> Figures:
        """auroc of all, then by kind of defect; where there are masks, pixel_auroc and pro too."""
        figures = {"auroc": compare(self.good, self.strange)}
        if self.defects is None:
            return figures
        labels = self.defects.images.take_labels(self.rows).cpu()
        has_mask = self.defects.has_mask[list(self.rows)]
        kinds: dict[str, Tensor] = {"": torch.ones(len(labels), dtype=torch.bool)}
        for number, kind in enumerate(self.defects.kinds):
            kinds[f"_{kind}"] = labels == number
        for ending, chosen in kinds.items():
            if ending:
                figures[f"auroc{ending}"] = compare(self.good, self.bad[chosen])
            figures |= dict(self.pixel_figures(ending, chosen & has_mask))
        return figures

    def pixel_figures(self, ending: str, chosen: Tensor) -> Iterator[tuple[str, float]]:
        """Of those pictures with defects, all of which have masks, and the good ones."""
        if not chosen.any():
            return
        no_mask = torch.zeros_like(self.good_maps, dtype=torch.bool)
        masks = torch.cat([no_mask, self.masks[chosen]])
        maps = torch.cat([self.good_maps, self.maps[chosen]])
        yield f"pixel_auroc{ending}", pixel_auroc(maps, masks)
        yield f"pro{ending}", per_region_overlap(maps, masks)


def compare(good: Tensor, bad: Tensor) -> float:
    """The AUROC of scores of good and bad pictures."""
    is_bad = torch.cat([torch.zeros(len(good)), torch.ones(len(bad))]).bool()
    return auroc(is_bad, torch.cat([good, bad]))
