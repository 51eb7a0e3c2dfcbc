"""Loss and gradients of a family's training step equal an independent step, cached or not."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tests.shared.families import FACTOR, FLOWS, LENGTH, TEXT, encoded, guided, whole
from tests.shared.runs import PRIOR, first_gradients
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters


def velocity(pipe, x_t, t, prompts):
    """From noisy latents and prompts by diffusers' parts alone."""
    condition = encoded(pipe, prompts, max_sequence_length=LENGTH)
    if isinstance(pipe, StableDiffusion3Pipeline):
        return pipe.transformer(x_t, timestep=1000 * t, **condition).sample
    height, width = x_t.shape[-2:]
    tokens = pipe.transformer(
        FluxPipeline._pack_latents(x_t, *x_t.shape),
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            len(x_t), height // 2, width // 2, "cpu", x_t.dtype
        ),
        txt_ids=torch.zeros(LENGTH, 3),
        guidance=torch.full((len(x_t),), 3.5),
        **condition,
    ).sample
    return FluxPipeline._unpack_latents(tokens, height * FACTOR, width * FACTOR, FACTOR)


PRECONDITION = "objective.precondition=true"
STEPS = {
    "plain": (),
    "prior": PRIOR,
    "text encoders": (TEXT,),
    "text encoders and prior": (TEXT, *PRIOR),
    "preconditioned": (PRECONDITION, *PRIOR),
}


@pytest.mark.parametrize("overrides", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", FLOWS)
def test_loss_and_every_gradient_equal_an_independent_step(settings, bases, name, overrides):
    """The reference is written from the papers with diffusers' own parts; it shares only the
    draws."""
    task, batch, rows, loss, gradients = first_gradients(
        settings(*guided(name), *overrides, family=name)
    )
    trained = {
        part: getattr(task.family.pipe, part)
        for part in ("transformer", *task.module.text_encoders)
    }
    assert len(trained) == 1 + (len(task.family.clip_encoders) if TEXT in overrides else 0)
    pipe, rng = (
        DiffusionPipeline.from_pretrained(bases[name], **trained),
        SampleRng(0, 0, rows, global_batch_size=2),
    )
    mean, logvar = batch["moments"].chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * rng.normal(mean.shape)
    x0 = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    eps = rng.normal(x0.shape)
    t = torch.sigmoid(torch.special.ndtri(rng.uniform(stratified=True)))
    shift = (
        3.0 if name == "sd3" else math.exp(calculate_shift(16))
    )  # 16 pixels are 8 latents are 4 x 4 tokens
    t = shift * t / (1 + (shift - 1) * t)
    level = t.view(-1, 1, 1, 1)
    x_t = (1 - level) * x0 + level * eps
    task.module.zero_grad()
    v = velocity(pipe, x_t, t, ["a b c"] * 2 + ["c"] * (len(rows) - 2))
    output, target = (x_t - level * v, x0) if PRECONDITION in overrides else (v, eps - x0)
    expected = F.mse_loss(output[:2], target[:2])
    if set(PRIOR) <= set(overrides):
        expected = expected + 0.5 * F.mse_loss(output[2:], target[2:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, parameter in trainable_parameters(task.module).items():
        unused = (
            name == "sd3" and "transformer_blocks.1.attn.add_q_proj" in key
        )  # the last block drops the text
        assert (gradients[key].abs().max() > 0) != unused, key
        torch.testing.assert_close(gradients[key], parameter.grad, msg=key)


@pytest.mark.parametrize("text", [(), (TEXT,)], ids=["transformer", "and text encoders"])
@pytest.mark.parametrize("name", FLOWS)
def test_no_cache_gives_identical_gradients(settings, name, text):
    overrides = ("data.caption_dropout=0.5", *text)
    cached, live = (
        first_gradients(settings(f"data.cache={keep}", *overrides, family=name))[-1]
        for keep in ("true", "false")
    )
    assert all(torch.equal(cached[key], live[key]) for key in cached)


@pytest.mark.parametrize("name", FLOWS)
def test_a_cached_prompt_depends_on_how_much_of_it_the_t5_reads(settings, tmp_path, name):
    ten, twelve = (
        CachedEncoder(
            whole(settings(f"model.max_sequence_length={n}", family=name)), tmp_path, True, ()
        )
        for n in (10, 12)
    )
    changed = {
        part: ten.prompt_key(part, "a") != twelve.prompt_key(part, "a")
        for part in ten.family.text_encoder_names
    }
    assert changed == {
        part: part == ten.family.long_encoder for part in ten.family.text_encoder_names
    }
