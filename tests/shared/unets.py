"""Small U-Nets of every use and pictures for them."""

import shutil

import pytest
import torch

from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.uses import USES


@pytest.fixture(scope="session")
def coloured(blobs, tmp_path_factory):
    """Folder of pictures in colour, without masks."""
    return copy_images(blobs, tmp_path_factory.mktemp("coloured"))


def copy_images(pairs, folder):
    """The pictures of a folder of pairs alone."""
    for path in pairs.glob("*_image.png"):
        shutil.copy(path, folder)
    return folder


def write_config(folder, images, resolution, steps):
    """The file of a short run on the pictures in a folder, which goes to FOLDER/run."""
    path = folder / "config.yaml"
    path.write_text(
        f"""
kind: unet
output_dir: {folder}/run
model: {{width: 8, levels: 2}}
data: {{image_dir: {images}, folds: 4, channels: 3, resolution: {resolution}}}
optimizer: {{learning_rate: 1e-2}}
train: {{max_train_steps: {steps}, train_batch_size: 4}}
tracking: {{report_to: [], log_every: 10}}
"""
    )
    return path


@pytest.fixture
def settings(blobs, coloured, tmp_path):
    """A function: use, overrides -> Config of a short run on the blobs."""
    path = write_config(tmp_path, coloured, resolution=16, steps=50)
    pairs = [f"data.image_dir={blobs}"]
    sources = {"segment": pairs, "pix2pix": [*pairs, "data.target_suffix=_target"]}
    return lambda use, *overrides: loading.load_config(
        path, [f"use={use}", *sources.get(use, []), *overrides]
    )


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return (256 * random(*shape, seed=seed)).byte()


def draws(n, step=0):
    return SampleRng(0, step, range(n))


def prepared(config):
    use = USES[config.use](config)
    if config.use == "colorize":
        use.prepare(load_images(config.data, "cpu"))
    return use
