"""Pictures with defects, to measure with: the kind of each, and where its defect is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainers.config.autoencoder import GOOD, AutoencoderImagesConfig
from trainers.data.folders import relative_name, scan_folder
from trainers.data.imaging import to_float
from trainers.data.intake import Intake
from trainers.data.pictures import picture_from_file
from trainers.errors import UserError, name_some
from trainers.from_scratch.image_samples import ImageSample
from trainers.from_scratch.image_sets import ImageSet, decode_sample

MASKS = "ground_truth"
MASK_ENDING = "_mask"
ONLY_KIND = "defect"  # of pictures that lie in no folder of their kind


@dataclass(frozen=True)
class Defects:
    """Pictures with defects; `images.labels` are their kinds, by `kinds`, and the last of their
    channels is white where the defect is, or black where that is not known."""

    images: ImageSet
    has_mask: Tensor  # (N,) bool

    @property
    def kinds(self) -> Sequence[str]:
        return self.images.class_names

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The pictures (B, C, S, S) in [-1, 1] and the masks (B, S, S), boolean."""
        pixels = self.images.take(rows)
        return to_float(pixels[:, :-1]), pixels[:, -1] > 0


def load_defects(
    config: AutoencoderImagesConfig, train: ImageSet, device, intake: Intake
) -> Defects | None:
    """Those of `data.bad_dir`, or of MVTec's folders; None where the config has neither.

    Raises: UserError where there is no picture, or one that cannot be read.
    """
    if config.defects_dir is None:
        return None
    samples, kinds = list_defects(config, intake)
    known = {sample.picture.digest for sample in train.samples}
    learnt = [s.picture.short_name for s in samples if s.picture.digest in known]
    if learnt:
        intake.warn(f"pictures with defects are also training pictures: {name_some(learnt)}")
    decode = partial(decode_defect, config=config)
    images = ImageSet(samples, decode, config.in_memory, device, kinds)
    return Defects(images, torch.tensor([sample.target is not None for sample in samples]))


def list_defects(
    config: AutoencoderImagesConfig, intake: Intake
) -> tuple[list[ImageSample], list[str]]:
    """The pictures with their masks and kinds, and how the kinds are called, in order."""
    root = config.defects_dir
    places = [folder / MASKS for folder in (root, root.parent)]
    masks_dir = next((folder for folder in places if folder.is_dir()), None)
    by_kind: dict[str, list[Path]] = {}
    for path in scan_folder(root, [masks_dir]).pictures:
        folders = path.relative_to(root).parts[:-1]
        by_kind.setdefault(folders[0] if folders else ONLY_KIND, []).append(path)
    good = by_kind.pop(GOOD, [])
    if not by_kind:
        raise UserError(
            f"data.bad_dir: there is no picture with a defect in {root}. Put those of each kind "
            "into a folder of its own there"
        )
    if good and config.test_dir is None:
        intake.note(f"not used: {len(good)} pictures in {root.name}/{GOOD}, which have no defect")
    mask_by_name = {}
    for path in scan_folder(masks_dir).pictures if masks_dir else []:
        name = relative_name(path.with_suffix(""), masks_dir)
        mask_by_name[name.removesuffix(MASK_ENDING)] = path
    samples = []
    for number, paths in enumerate(by_kind.values()):
        for path in paths:
            mask = mask_by_name.pop(relative_name(path.with_suffix(""), root), None)
            target = picture_from_file(mask) if mask else None
            picture = picture_from_file(path, bit_depth=config.bit_depth)
            samples.append(ImageSample(picture, target, number))
    describe_defects(samples, list(by_kind), list(mask_by_name), intake)
    return samples, list(by_kind)


def describe_defects(
    samples: Sequence[ImageSample], kinds: Sequence[str], unused: Sequence[str], intake: Intake
) -> None:
    """Note how many there are of each kind, how many without a mask, and masks of none."""
    counts = []
    for number, kind in enumerate(kinds):
        masks = [sample.target is not None for sample in samples if sample.label == number]
        lacking = f", {masks.count(False)} without a mask" if not all(masks) else ""
        counts.append(f"{len(masks)} of {kind}{lacking}")
    intake.note("pictures with defects, which are only measured with: " + "; ".join(counts))
    if unused:
        intake.warn(f"masks without a picture of that name: {name_some(unused)}")


def decode_defect(sample: ImageSample, config: AutoencoderImagesConfig) -> Tensor:
    """(C + 1, S, S) uint8: the picture, and its mask, 255 where the defect is, else 0.

    A pixel is of the defect where half of it is; of one so thin that no pixel is, the pixels that
    have most of it are. Raises: UserError for a mask of another size than its picture's.
    """
    picture = decode_sample(replace(sample, target=None), config, None)
    mask = torch.zeros(1, *picture.shape[1:], dtype=torch.uint8)
    if sample.target is None:
        return torch.cat([picture, mask])
    image, size = sample.target.decode().convert("L"), sample.picture.decode().size
    if image.size != size:
        sizes = "{} x {}, not {} x {}".format(*image.size, *size)
        raise UserError(f"{sample.target.name} has not the size of its picture: {sizes}")
    whole = Image.fromarray((np.asarray(image) > 0).astype(np.float32))
    share = np.asarray(whole.resize(mask.shape[1:], Image.Resampling.BOX))
    inside = (share > 0) & (share >= min(0.5, share.max()))
    return torch.cat([picture, torch.from_numpy(255 * inside.astype(np.uint8))[None]])
