"""Folders of pictures and the config that names them."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from trainers.config import DataConfig
from trainers.data.pictures import Picture

GREY = np.add.outer(np.arange(0, 128, 16), np.arange(0, 128, 16)).astype(np.uint8)  # (8, 8)


PICTURE = Picture("0.png", partial(bytes, b"0"), "")


def data(folder=None, **keys):
    return DataConfig(**{"instance_data_dir": folder, "instance_prompt": "prompt", **keys})


@pytest.fixture
def put(tmp_path):
    """A function that saves a small picture (or writes given bytes) as a name, and returns the
    path."""

    def save(name, content=None, **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (content or Image.fromarray(GREY).convert("RGB")).save(path, **options)
        return path

    return save


def decoded(path):
    return Picture(path.name, path.read_bytes, "").decode()
