"""The uses of the U-Net by name. A new one is a file here and a line below."""

from __future__ import annotations

from trainers.from_scratch.uses.base import Use
from trainers.from_scratch.uses.colorize import Colorize
from trainers.from_scratch.uses.pix2pix import Pix2Pix
from trainers.from_scratch.uses.restore import Restore
from trainers.from_scratch.uses.segment import Segment

USES: dict[str, type[Use]] = {
    "segment": Segment,
    "colorize": Colorize,
    "pix2pix": Pix2Pix,
    "restore": Restore,
}
