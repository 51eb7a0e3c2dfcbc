"""Short runs of every trainer of small networks, and what they leave behind."""

import json
from functools import cache, partial

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.shared.oracles import assert_trained_alike
from tests.shared.runs import read_metrics
from trainers import gan
from trainers.config import loading
from trainers.from_scratch.classifier import train_classifier
from trainers.run import run

KINDS = {
    "autoencoder": "kind=autoencoder use=denoise model.latent_dim=4 data.resolution=16 "
    "data.random_flip=true",
    "gan": "kind=gan data.resolution=28 model.latent_dim=4 model.spectral_norm=true "
    "model.conditional=true "
    "objective.augment=[color,translation,cutout] objective.r2=0.5 objective.penalty_every=3 "
    "objective.generator_every=2 train.train_batch_size=8",
    "segment": "kind=unet use=segment data.crop=true data.elastic=2 data.random_flip=true "
    "data.random_rotate=true "
    "data.random_vertical_flip=true",
    "pix2pix": "kind=unet use=pix2pix data.target_suffix=_target data.channels=3 "
    "data.random_flip=true",
}


def config_maker(bars, blobs, root):
    """A function: kind, name of the run, overrides -> Config of a run of twelve steps with a
    checkpoint every third.

    Adam's epsilon is large: biases before a norm have no gradient but rounding errors, which it
    else makes steps of.
    """
    (root / "config.yaml").write_text(
        """
model: {width: 8}
optimizer: {learning_rate: 3e-3, eps: 1e-3}
train: {max_train_steps: 12, train_batch_size: 4, ema_decay: 0.9}
checkpoint: {checkpointing_steps: 3}
tracking: {report_to: [], log_every: 1}
"""
    )
    lone = [f"data.dataset_name={bars}"]
    pairs = [f"data.image_dir={blobs}", "data.folds=4", "data.resolution=16", "model.levels=2"]
    sources = {
        "autoencoder": lone,
        "gan": [*lone, "data.label_column=label"],
        "segment": pairs,
        "pix2pix": pairs,
    }

    def settings(kind, name, *overrides):
        first = [*KINDS[kind].split(), *sources[kind], f"output_dir={root}/{kind}-{name}"]
        return loading.load_config(root / "config.yaml", [*first, *overrides])

    return settings


@pytest.fixture(scope="session")
def make(bars, blobs, tmp_path_factory):
    return config_maker(bars, blobs, tmp_path_factory.mktemp("runs"))


def measure_quickly(patch=setattr):
    """A GAN's figures need a classifier; one of a few steps will do."""
    patch(gan, "train_classifier", partial(train_classifier, steps=3))


@pytest.fixture(scope="module")
def measured_quickly():
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch.setattr)
        yield


@pytest.fixture(scope="session")
def undisturbed(make):
    """A function: kind -> settings of a finished run."""

    @cache
    def finished(kind):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = make(kind, "whole")
        run(settings)
        return settings

    return finished


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def whole(kind, undisturbed):
    return undisturbed(kind)


def state(settings):
    """Every tensor of the last checkpoint: all players' weights, buffers, averages and
    optimisers."""
    folder, tensors = max((settings.output_dir / "checkpoints").iterdir()), {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("*.pt")):
        for i, moments in torch.load(path)["state"].items():
            tensors |= {f"{path.name} {i} {name}": tensor for name, tensor in moments.items()}
    return tensors


def weights(settings):
    return {name: tensor for name, tensor in state(settings).items() if "optimizer" not in name}


def losses(settings):
    return [
        {name: value for name, value in row.items() if name.endswith("_loss")}
        for row in read_metrics(settings)
    ]


def figures(settings):
    return json.loads((settings.output_dir / "figures.json").read_text())


def assert_same(one, other):
    """To the bit."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(one) == losses(other)
    assert figures(one) == figures(other)


def assert_close(one, other):
    assert_trained_alike(
        (losses(one), losses(other)), (weights(one), weights(other)), one.optimizer.learning_rate
    )


def written(settings, path):
    path.write_text(loading.dump_config(settings))
    return path
