"""Predictions, times and latents are those of the family's own diffusers pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)

from tests.shared.draws import Given
from tests.shared.families import (
    ALL,
    FACTOR,
    FLOWS,
    UNETS,
    conditioned,
    guided,
    pipeline_steps,
    whole,
)
from tests.shared.tiny_pipelines import make_flux
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.families.objectives import DDPM, RectifiedFlow
from trainers.run import run


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_predictions_equal_the_pipelines(settings, pipes, name, size):
    """Both of the pipeline's steps go in at once, so each row must be read at its own time."""
    x_t, t, v = pipeline_steps(pipes[name], name, *size)
    family = whole(settings(*guided(name), family=name))
    assert x_t.shape[-2:] == (size[0] // FACTOR, size[1] // FACTOR)
    with torch.no_grad():
        ours = family.predict(family.denoiser, x_t, t, conditioned(family, "a b c", "a b c"))
    torch.testing.assert_close(ours, v)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("shift", ["auto", "none", "2.5"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 16)])
def test_times_are_shifted_as_the_pipelines_at_the_training_size(
    settings, pipes, name, shift, height, width
):
    config = settings(
        f"objective.shift={shift}", "objective.density=uniform", "data.resolution=32", family=name
    )
    grid, pipe = [0.9, 0.5, 0.1], pipes[name]
    pipe(
        "a",
        height=height,
        width=width,
        num_inference_steps=3,
        sigmas=grid,
        guidance_scale=1,
        output_type="latent",
    )
    objective = whole(config).make_objective(config.objective, (height // 2, width // 2))
    times = objective.times(Given(torch.tensor(grid)))
    g = torch.tensor(grid)
    expected = {"auto": pipe.scheduler.sigmas[:-1], "none": g, "2.5": 2.5 * g / (1 + 1.5 * g)}
    torch.testing.assert_close(times, expected[shift])


def test_every_objective_key_reaches_the_objective(settings):
    flow = {"density": "mode", "logit_mean": 0.3, "logit_std": 0.4, "mode_scale": 0.5, "shift": 2.0}
    flow |= {"weighting": "cosmap", "precondition": True, "stratified": False}
    config = settings(*(f"objective.{key}={value}" for key, value in flow.items()), family="sd3")
    assert whole(config).make_objective(config.objective, (8, 8)) == RectifiedFlow(**flow)
    ddpm = {"snr_gamma": 2.0, "noise_offset": 0.2, "stratified": False}
    config = settings(*(f"objective.{key}={value}" for key, value in ddpm.items()))
    objective = whole(config).make_objective(config.objective, (8, 8))
    assert objective == DDPM(objective.abar, **ddpm)
    config = settings("objective.debiased=true")
    assert whole(config).make_objective(config.objective, (8, 8)).debiased


@pytest.mark.parametrize("name", ALL)
def test_latents_are_what_the_pipeline_decodes(settings, pipes, name):
    """A sampler's step over no noise hands the latents on to the pipeline's own decoding."""
    family, pipe = whole(settings(family=name)), pipes[name]
    pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.latents(family.encode_image(pixels)[None], SampleRng(0, 0, [7]))
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels[None]).latent_dist
        expected = pipe.vae.decode(
            posterior.mean + posterior.std * SampleRng(0, 0, [7]).normal(latents.shape)
        ).sample
        if name in UNETS:
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        else:
            tokens = (
                FluxPipeline._pack_latents(latents, *latents.shape) if name == "flux" else latents
            )
            decoded = pipe(
                "a",
                height=16,
                width=16,
                num_inference_steps=1,
                sigmas=[1e-9],
                latents=tokens,
                output_type="pt",
            ).images
    torch.testing.assert_close(decoded.clamp(0, 1), (expected / 2 + 0.5).clamp(0, 1))


def test_an_autoencoder_without_a_scale_has_the_default_of_diffusers(settings, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    file = copy / "vae/config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    family = whole(settings(f"model.pretrained_model_name_or_path={copy}"))
    assert (
        family.vae_config["scaling_factor"]
        == AutoencoderKL.from_pretrained(copy / "vae").config.scaling_factor
    )
    moments = torch.randn(1, 8, 4, 4)
    moments[:, 4:] = -1000  # a posterior without spread: its draw is its mean
    torch.testing.assert_close(
        family.latents(moments, SampleRng(0, 0, [0])), 0.18215 * moments[:, :4]
    )


def test_schnell_trains_only_on_request(settings, tmp_path):
    pipe = make_flux(guidance_embeds=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.save_pretrained(tmp_path / "schnell")
    base = f"model.pretrained_model_name_or_path={tmp_path / 'schnell'}"
    with pytest.raises(UserError, match=r"schnell.*model\.allow_schnell=true"):
        run(settings(base, family="flux"))
    config = settings(base, "model.allow_schnell=true", "train.max_train_steps=2", family="flux")
    run(config)
    family = whole(config)
    x_t, t, v = pipeline_steps(FluxPipeline.from_pretrained(tmp_path / "schnell"), "flux", 16, 16)
    with torch.no_grad():
        ours = family.predict(family.denoiser, x_t, t, conditioned(family, "a b c", "a b c"))
    torch.testing.assert_close(ours, v)
    assert family.make_objective(config.objective, (8, 8)).shift == 1.0
