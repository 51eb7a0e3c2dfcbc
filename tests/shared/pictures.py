"""Folders of pictures and the config that names them."""

import time
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


def let_time_pass(path):
    """Until a change of the file shows in its times."""
    probe = path.parent / ".probe"
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return
        time.sleep(0.001)
