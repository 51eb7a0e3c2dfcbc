"""What the first step of a run trains, against an independent step."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from tests.shared.runs import PRIOR, first_gradients
from trainers import dreambooth
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters


@pytest.mark.parametrize("prior", [(), PRIOR])
def test_loss_and_every_gradient_equal_an_independent_step(settings, base, prior):
    """The reference is written from the papers with diffusers' own parts; it shares only the
    draws."""
    task, batch, rows, loss, gradients = first_gradients(settings(*prior))
    pipe, rng = (
        StableDiffusionPipeline.from_pretrained(base),
        SampleRng(0, 0, rows, global_batch_size=2),
    )
    mean, logvar = batch["moments"].chunk(2, dim=1)
    x0 = (mean + (0.5 * logvar).exp() * rng.normal(mean.shape)) * pipe.vae.config.scaling_factor
    eps = rng.normal(x0.shape)
    t = (rng.uniform(stratified=True) * 1000).long()
    x_t = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, eps, t)
    prompts = ["a b c"] * 2 + ["c"] * (len(rows) - 2)
    embeddings, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    task.module.zero_grad()
    prediction = task.family.denoiser(x_t, t, embeddings).sample
    expected = F.mse_loss(prediction[:2], eps[:2])
    if prior:
        expected = expected + 0.5 * F.mse_loss(prediction[2:], eps[2:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trainable_parameters(task.module).items():
        assert gradients[name].abs().max() > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_latents_are_what_the_pipeline_decodes(settings, base, photos):
    """Decoding `latents / scaling_factor` as the pipeline does must give back the autoencoder's own
    reconstruction."""
    task, batches, _ = dreambooth.build(settings("train.train_batch_size=1"), Accelerator(cpu=True))
    batch, rng = next(iter(batches(0)))
    pipe = StableDiffusionPipeline.from_pretrained(base)
    latents = task.family.latents(batch["moments"], rng)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.detach()
    mean, logvar = batch["moments"].chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * SampleRng(0, 0, rng.rows).normal(mean.shape)
    torch.testing.assert_close(decoded, pipe.vae.decode(z).sample.detach())
    assert VaeImageProcessor().postprocess(decoded)[0].size == (16, 16)


@pytest.mark.parametrize("crop", [(), ("data.center_crop=false", "data.random_flip=true")])
def test_no_cache_gives_identical_gradients(settings, crop):
    cached, live = (
        first_gradients(settings(f"data.cache={keep}", *crop))[-1] for keep in ("true", "false")
    )
    assert all(torch.equal(cached[name], live[name]) for name in cached)


def test_a_new_lora_changes_nothing(settings, base):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True))
    unet = StableDiffusionPipeline.from_pretrained(base).unet
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, 16)
    with torch.no_grad():
        assert torch.equal(task.module(x, t, {"text_encoder": text}), unet(x, t, text).sample)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_is_float32_and_nothing_else_trains(settings, precision):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True, mixed_precision=precision))
    for name, parameter in task.module.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert not parameter.requires_grad or parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("override", "told"), [("lora.rank=3", False), ("lora.dropout=0.1", True), ("lora=null", True)]
)
def test_a_base_in_half_precision_computes_in_it_and_autocast_only_helps_float32_weights(
    settings, override, told
):
    """Autocast would have norms compute, and keep their inputs, in float32."""
    task, batches, _ = dreambooth.build(
        settings(override), Accelerator(cpu=True, mixed_precision="bf16")
    )
    seen = []
    task.family.denoiser.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    ((_, loss),) = task.losses(*next(iter(batches(0))))
    loss.backward()
    assert seen == [told]
    assert all(p.grad.dtype == torch.float32 for p in trainable_parameters(task.module).values())


def test_encoders_are_freed_before_the_denoiser_loads(settings):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True))
    assert task.family.pipe.text_encoder is None
    assert task.family.pipe.vae is None
