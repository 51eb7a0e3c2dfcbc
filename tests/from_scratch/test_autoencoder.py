"""An autoencoder run on a small set: it learns, measures, and loads again by one call."""

import json

import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch.distributions import Normal, kl_divergence

from trainers.autoencoder import Autoencoder
from trainers.config import loading
from trainers.data.imaging import to_float
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.anomaly_scores import ReconstructionScorer
from trainers.from_scratch.codes import corrupt
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.run import run


@pytest.fixture
def settings(bars, tmp_path):
    """A function: overrides -> Config of a short run."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
kind: autoencoder
output_dir: {tmp_path}/run
model: {{latent_dim: 4, width: 8}}
data: {{dataset_name: {bars}, label_column: label, resolution: 16}}
optimizer: {{learning_rate: 3e-3}}
train: {{max_train_steps: 60, train_batch_size: 16}}
checkpoint: {{checkpointing_steps: 10}}
tracking: {{report_to: [], log_every: 10}}
"""
    )
    return lambda *overrides: loading.load_config(path, overrides)


def figures(settings):
    return json.loads((settings.output_dir / "figures.json").read_text())


@pytest.mark.parametrize("use", ["reconstruct", "denoise"])
def test_it_comes_nearer_to_the_picture_than_what_it_is_shown_or_their_mean(settings, bars, use):
    final = settings(f"use={use}", "train.max_train_steps=300", "train.ema_decay=0.9")
    run(final)
    test = load_images(final.data, "cpu", held_out=True)
    x = (test.pixels.float() / 255 - test.pixels.float().mean(0) / 255).square().mean()
    assert figures(final)["psnr"] > float(-10 * torch.log10(x))
    assert figures(final)["linear_probe"] > 0.8
    assert (final.output_dir / "samples/final/grid.png").exists()


def test_the_written_auroc_is_that_of_the_saved_model(settings):
    scorer = "validation.scorer=reconstruction"
    final = settings("use=anomaly", "data.only_label=0", "train.max_train_steps=300", scorer)
    run(final)
    model = ConvAutoencoder.from_pretrained(final.output_dir / "model")
    test = load_images(final.data, "cpu", held_out=True)
    judge = ReconstructionScorer(model, final)
    score = judge.scores(judge.maps(to_float(test.pixels)))
    assert figures(final)["auroc"] == pytest.approx(roc_auc_score(test.labels == 1, score))
    assert figures(final)["auroc"] > 0.8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("use=anomaly", "data.only_label"),
        ("data.label_column=null", "data.only_label"),
        ("data.image_dir=/no/folder", "data.image_dir"),
        ("data.resolution=30", "data.resolution: must be a multiple of 4"),
        ("kind=autoencodr", "did you mean autoencoder"),
        ("model.latent_dims=3", "did you mean model.latent_dim"),
    ],
)
def test_mistakes_in_the_config_are_named(settings, override, message):
    more = ["data.only_label=1"] if override == "data.label_column=null" else []
    with pytest.raises(UserError, match=message):
        settings(override, *more)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.only_label=7", "label 7: there is no picture"),
        ("data.test_split=tests", "split 'tests'"),
    ],
)
def test_data_that_is_not_there_is_named(settings, override, message):
    with pytest.raises(UserError, match=message):
        run(settings(override))


def test_what_is_shown_has_the_noise_that_was_asked_for(settings):
    final = settings("use=denoise", "objective.noise=0.1")
    gray = torch.zeros(50, 1, 16, 16)  # far from the ends, where noise is cut
    noise = corrupt(gray, final, SampleRng(0, 0, range(50))) / 2
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)


def test_the_variational_loss_is_the_error_and_the_divergence_of_the_posterior(settings):
    task, batches, _ = Autoencoder.build(
        settings("model.variational=true", "objective.kl_weight=0.3"), Accelerator(cpu=True)
    )
    batch, rng = next(iter(batches(0)))
    ((_, loss),) = task.losses(batch, rng)
    x = to_float(batch["pixels"])
    mean, logvar = task.model.posterior(x)
    posterior = Normal(mean, (logvar / 2).exp())
    out = task.model.decode(mean + posterior.stddev * SampleRng(0, 0, rng.rows).normal(mean.shape))
    divergence = kl_divergence(posterior, Normal(0, 1)).mean()
    torch.testing.assert_close(loss, (out - x).square().mean() + 0.3 * divergence)
