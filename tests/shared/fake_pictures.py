"""Pictures without pixels, and encoders whose outputs tell what was encoded."""

from functools import partial
from zlib import crc32

import torch

from trainers.data.pictures import Picture, PictureFacts


def fake(i, caption="caption", size=(600, 512), repeats=1, others=(), **more):
    """A picture with a name and a size, and nothing to decode.

    others: captions of which a visit may draw one too; more: other fields of a picture.
    """
    more |= {"repeats": repeats, "other_captions": others}
    picture = Picture(f"{i}", partial(str.encode, f"{i}"), caption, **more)
    picture.__dict__["facts"] = PictureFacts(size, f"{i}", None, None, None)
    return picture


def number(picture):
    """By which the moments tell a picture."""
    return int(picture.digest[:12], 16)


class Fake:
    """Stands for the encoders: moments tell the picture and its view, conditions tell the
    prompt."""

    def moments(self, picture, crop):
        return torch.tensor([number(picture), crop.left, crop.top, crop.flip], dtype=torch.float64)

    def text_inputs(self, prompt):
        return {"text": torch.tensor([len(prompt), crc32(prompt.encode())])}
