"""Maps of what is strange, as pictures for people and as numbers for programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainers.data.imaging import write_picture

COLORS = "inferno"  # matplotlib's: dark where all is well
MOST_HIDDEN = 0.75  # of a picture below the strangest place


def to_unit(maps: Tensor, scale: Tensor) -> np.ndarray:
    """0 up to the first value of the scale (2,), 1 from the second on."""
    low, high = scale
    return ((maps - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).cpu().numpy()


def color_maps(maps: Tensor, scale: Tensor) -> list[Image.Image]:
    """Maps (B, H, W) as RGB pictures."""
    from matplotlib import colormaps

    colors = colormaps[COLORS](to_unit(maps, scale))[..., :3]
    return [Image.fromarray((255 * color).round().astype(np.uint8)) for color in colors]


def write_heat_map(picture: Image.Image, values: Tensor, scale: Tensor, path: Path) -> None:
    """Two files of the size of the picture: `path` shows it with what is strange on it, and the
    same name with .tiff has the values of the map (S, S) as 32-bit floats, as MVTec's own
    evaluation reads them."""
    width, height = picture.size
    path.parent.mkdir(parents=True, exist_ok=True)
    full = F.interpolate(values[None, None], (height, width), mode="bilinear")[0]
    (heat,) = color_maps(full, scale)
    opacity = Image.fromarray((255 * MOST_HIDDEN * to_unit(full, scale)[0]).astype(np.uint8))
    write_picture(Image.composite(heat, picture.convert("RGB"), opacity), path)
    write_picture(Image.fromarray(full[0].cpu().numpy()), path.with_suffix(".tiff"))
