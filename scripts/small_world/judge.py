"""The judge of the small world: a network that reads pictures.

It has seen every pattern and face, and never gives a training signal.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from .world import ASSETS, BACKGROUNDS, CLASSES, COLORS, PATTERNS, SIZE, to_pixels


class Judge(ModelMixin, ConfigMixin):
    """Reads a picture: one linear head per attribute on a common feature vector.

    The features also serve for cosines. `centre` (features,) is the mean feature of real pictures,
    which is subtracted before.
    """

    HEADS = (
        ("shape", len(CLASSES)),
        ("colour", len(COLORS)),
        ("background", len(BACKGROUNDS)),
        ("pattern", len(PATTERNS)),
        ("colour2", len(COLORS)),
        ("face", 2),
    )

    @register_to_config
    def __init__(self, width: int = 24, features: int = 96):
        super().__init__()
        layers = []
        for c, d in pairwise((3, width, 2 * width, 4 * width)):
            layers.append(nn.Conv2d(c, d, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(d), nn.ReLU(), nn.MaxPool2d(2)]
        joint = nn.Linear(4 * width * (SIZE // 8) ** 2, features)
        self.trunk = nn.Sequential(*layers, nn.Flatten(), joint, nn.ReLU())
        heads = {name: nn.Linear(features, values) for name, values in self.HEADS}
        self.heads = nn.ModuleDict(heads)
        self.register_buffer("centre", torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """x (B, 3, SIZE, SIZE) in -1..1 -> logits per head (B, values), features (B, features)."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}, features

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        """-> the index read off by each head (B,), centred unit features (B, features)."""
        pixels = to_pixels(np.stack([np.asarray(picture) for picture in pictures]))
        logits, features = self(pixels.to(self.device, self.dtype))
        labels = {name: values.argmax(1) for name, values in logits.items()}
        return labels, F.normalize(features - self.centre, dim=1)


def load_judge() -> Judge:
    return Judge.from_pretrained(ASSETS / "judge").float().eval()
