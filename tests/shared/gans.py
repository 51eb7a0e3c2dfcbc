"""Small GANs and pictures for them."""

import pytest
import torch
from accelerate import Accelerator

from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.gan import Gan

ROWS = range(6)


@pytest.fixture
def settings(bars, tmp_path):
    """A function: overrides -> Config of a short run."""
    path = written(bars, tmp_path)
    return lambda *overrides: loading.load_config(path, overrides)


def written(bars, folder):
    path = folder / "config.yaml"
    path.write_text(
        f"""
kind: gan
output_dir: {folder}/run
model: {{latent_dim: 4, width: 8}}
data: {{dataset_name: {bars}, label_column: label, test_split: null, resolution: 28}}
train: {{max_train_steps: 4, train_batch_size: 6}}
tracking: {{report_to: [], log_every: 4}}
"""
    )
    return path


def build(settings):
    """The task, and its first batch."""
    task, batches, _ = Gan.build(settings, Accelerator(cpu=True))
    (batch, _), *_ = batches(0)
    return task, batch


def draws(step=0):
    return SampleRng(0, step, ROWS)


def pictures(n=40, channels=3, size=16):
    return torch.rand(n, channels, size, size, generator=torch.manual_seed(0)) * 2 - 1
