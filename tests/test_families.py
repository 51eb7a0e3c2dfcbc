"""Each family against its own diffusers pipeline: conditions, predictions, gradients, memory, and
the written file."""

import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import make_flux
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from oracles import assert_trained_alike
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageChops
from safetensors import safe_open
from test_objectives import Given
from test_training import PRIOR, first_gradients, lora, losses
from torch import nn

from trainers import dreambooth
from trainers.config import LoraConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.efficiency.apply import open_family
from trainers.errors import UserError
from trainers.families import FAMILIES, Family
from trainers.families.objectives import DDPM, RectifiedFlow
from trainers.lora.export import lora_state
from trainers.lora.layers import LoraLinear, add_lora, target_layers
from trainers.run import run

FLOWS = ("sd3", "flux")
ALL = ("sd15", *FLOWS)
TEXT = "train.train_text_encoder=true"
LENGTH = 10  # of the T5, as the fixture `settings` has it
FACTOR = 2  # pixels per latent of the tiny autoencoders


@pytest.fixture(scope="module")
def pipes(bases):
    """Family name -> the plain pipeline, to look at and to call."""
    return {name: DiffusionPipeline.from_pretrained(folder) for name, folder in bases.items()}


def guided(name):
    return ("model.guidance_scale=3.5",) if name == "flux" else ()


def whole(config):
    """The family with all its parts loaded."""
    family = open_family(config.model)
    family.load(family.denoiser_name, "vae", *family.text_encoder_names)
    return family


def conditioned(family, *prompts):
    """As the trainer does it: each prompt encoded alone, then stacked."""
    rows = []
    for prompt in prompts:
        outputs = [family.encode_prompt(name, prompt) for name in family.text_encoder_names]
        rows.append({key: value for output in outputs for key, value in output.items()})
    return family.condition({key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def encoded(pipe, prompts, **length):
    """The pipeline's own encoding, by the denoiser's names."""
    if isinstance(pipe, StableDiffusionPipeline):
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}
    if isinstance(pipe, StableDiffusion3Pipeline):
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **length
        )
    else:
        states, pooled, _ = pipe.encode_prompt(prompts, **length)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


# Text

PROMPTS = ["a b c", "", "a prompt that is longer than any of the text encoders reads"]


@pytest.mark.parametrize("name", ALL)
def test_conditions_equal_the_pipelines(settings, pipes, name):
    length = {} if name == "sd15" else {"max_sequence_length": LENGTH}
    theirs = encoded(pipes[name], PROMPTS, **length)
    torch.testing.assert_close(conditioned(whole(settings(family=name)), *PROMPTS), theirs)


@pytest.mark.parametrize("name", FLOWS)
def test_the_t5_reads_as_many_tokens_as_the_pipeline_lets_it(settings, pipes, name):
    family = whole(settings("model.max_sequence_length=null", family=name))
    ours, theirs = conditioned(family, *PROMPTS), encoded(pipes[name], PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # one by one, and all at once


def test_without_its_t5_sd3_is_conditioned_as_the_pipeline_without_it(settings, bases):
    pipe = StableDiffusion3Pipeline.from_pretrained(bases["sd3"], text_encoder_3=None)
    family = whole(settings("model.text_encoder_3=null", family="sd3"))
    assert family.pipe.text_encoder_3 is None
    theirs = encoded(pipe, PROMPTS, max_sequence_length=LENGTH)
    torch.testing.assert_close(conditioned(family, *PROMPTS), theirs)


# Denoiser


def pipeline_steps(pipe, name, height, width):
    """Latents (2, C, h, w), times and outputs of the denoiser in a pipeline's two steps."""
    inputs, outputs = [], []

    def record(_, args, kwargs, output):
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0])

    call = {} if name == "sd15" else {"max_sequence_length": LENGTH}
    denoiser = pipe.unet if name == "sd15" else pipe.transformer
    hook = denoiser.register_forward_hook(record, with_kwargs=True)
    noise, guidance = torch.Generator().manual_seed(0), 3.5 if name == "flux" else 1.0
    pipe(
        "a b c",
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=noise,
        output_type="latent",
        **call,
    )
    hook.remove()
    x_t, v = torch.cat(inputs), torch.cat(outputs)
    if name == "flux":
        x_t, v = (
            FluxPipeline._unpack_latents(tokens, height, width, FACTOR) for tokens in (x_t, v)
        )
    times = pipe.scheduler.timesteps
    return x_t, times if name == "sd15" else times / 1000, v


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
def test_times_are_shifted_as_the_pipelines_at_the_training_size(settings, pipes, name, shift):
    config = settings(
        f"objective.shift={shift}", "objective.density=uniform", "data.resolution=32", family=name
    )
    grid, pipe = [0.9, 0.5, 0.1], pipes[name]
    pipe(
        "a",
        height=32,
        width=32,
        num_inference_steps=3,
        sigmas=grid,
        guidance_scale=1,
        output_type="latent",
    )
    times = whole(config).make_objective(config.objective, 32).times(Given(torch.tensor(grid)))
    g = torch.tensor(grid)
    expected = {"auto": pipe.scheduler.sigmas[:-1], "none": g, "2.5": 2.5 * g / (1 + 1.5 * g)}
    torch.testing.assert_close(times, expected[shift])


def test_every_objective_key_reaches_the_objective(settings):
    flow = {"density": "mode", "logit_mean": 0.3, "logit_std": 0.4, "mode_scale": 0.5, "shift": 2.0}
    flow |= {"weighting": "cosmap", "precondition": True, "stratified": False}
    config = settings(*(f"objective.{key}={value}" for key, value in flow.items()), family="sd3")
    assert whole(config).make_objective(config.objective, 16) == RectifiedFlow(**flow)
    ddpm = {"snr_gamma": 2.0, "noise_offset": 0.2, "stratified": False}
    config = settings(*(f"objective.{key}={value}" for key, value in ddpm.items()))
    objective = whole(config).make_objective(config.objective, 16)
    assert objective == DDPM(objective.abar, **ddpm)
    config = settings("objective.debiased=true")
    assert whole(config).make_objective(config.objective, 16).debiased


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
        if name == "sd15":
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


def test_an_autoencoder_that_tells_no_scale_has_diffusers_default(settings, base, tmp_path):
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


# Steps


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
def test_a_cached_prompt_tells_how_much_of_it_a_t5_read(settings, tmp_path, name):
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
        part: part == ten.family.t5_encoder for part in ten.family.text_encoder_names
    }


# LoRA


def under(block, *layers):
    return {f"{block}.{layer}" for layer in layers}


SELF = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF, "add_q_proj", "add_k_proj", "add_v_proj")
FORWARD = ("ff.net.0.proj", "ff.net.2")
CONTEXT = ("ff_context.net.0.proj", "ff_context.net.2")
PLACES = [
    "down_blocks.0.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
    "mid_block.attentions.0",
]
UNET = [f"{place}.transformer_blocks.0" for place in PLACES]
ATTENTION = {
    "sd15": set().union(*(under(f"{block}.attn{i}", *SELF) for block in UNET for i in (1, 2))),
    "sd3": under("transformer_blocks.0.attn", *JOINT, "to_add_out")
    | under("transformer_blocks.0.attn2", *SELF)
    | under("transformer_blocks.1.attn", *JOINT),
    "flux": under("transformer_blocks.0.attn", *JOINT, "to_add_out")
    | set().union(
        *(under(f"single_transformer_blocks.{i}.attn", "to_q", "to_k", "to_v") for i in (0, 1))
    ),
}
MLP = {
    "sd15": set().union(*(under(block, *FORWARD) for block in UNET)),
    "sd3": under("transformer_blocks.0", *FORWARD, *CONTEXT)
    | under("transformer_blocks.1", *FORWARD),
    "flux": under("transformer_blocks.0", *FORWARD, *CONTEXT)
    | set().union(
        *(under(f"single_transformer_blocks.{i}", "proj_mlp", "proj_out") for i in (0, 1))
    ),
}


@pytest.fixture
def adapted(settings):
    """A function: family name, overrides -> the denoiser's layers that have LoRA."""

    def make(name, *overrides):
        config = settings(*overrides, family=name)
        family = FAMILIES[name](config.model)
        family.load(family.denoiser_name)
        add_lora(family, config.lora, ())
        return {
            layer
            for layer, module in family.denoiser.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    return make


@pytest.mark.parametrize("name", ALL)
def test_presets_take_these_layers_and_no_others(adapted, pipes, name):
    denoiser = pipes[name].unet if name == "sd15" else pipes[name].transformer
    linear = {layer for layer, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert adapted(name) == ATTENTION[name]
    assert adapted(name, "lora.target_modules=attention+mlp") == ATTENTION[name] | MLP[name]
    assert adapted(name, "lora.target_modules=all-linear") == linear


WISHES = {
    "endings": (
        "flux",
        ("lora.target_modules=[to_add_out, norm_out.linear]",),
        ["transformer_blocks.0.attn.to_add_out", "norm_out.linear"],
    ),
    "a convolution": ("sd3", ("lora.target_modules=[pos_embed.proj]",), ["pos_embed.proj"]),
    "a regex of whole names": (
        "flux",
        (r"lora.target_modules=transformer_blocks\.\d\.attn\.to_[qk]",),
        ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"],
    ),
    "blocks": (
        "flux",
        ("lora.blocks=[single_transformer_blocks.1]",),
        [f"single_transformer_blocks.1.attn.{layer}" for layer in ("to_q", "to_k", "to_v")],
    ),
    "blocks and a list": (
        "sd3",
        (
            "lora.blocks=[transformer_blocks.1, transformer_blocks.0.attn2]",
            "lora.target_modules=[to_v]",
        ),
        ["transformer_blocks.1.attn.to_v", "transformer_blocks.0.attn2.to_v"],
    ),
    "blocks and a regex": (
        "sd15",
        ("lora.blocks=[mid_block]", "lora.target_modules=.*attn1.to_q"),
        ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
    ),
}


@pytest.mark.parametrize(("name", "overrides", "layers"), WISHES.values(), ids=WISHES)
def test_wishes_take_these_layers_and_no_others(adapted, name, overrides, layers):
    assert adapted(name, *overrides) == set(layers)


@pytest.mark.parametrize(("rslora", "scale"), [("false", 5 / 2), ("true", 5 / 2**0.5)])
def test_the_update_is_scaled_by_alpha_over_rank_and_written_as_b_a(settings, rslora, scale):
    config = settings("lora.alpha=5", f"lora.use_rslora={rslora}", family="sd3")
    family = whole(config)
    add_lora(family, config.lora, family.clip_encoders)
    for part in ("transformer", *family.clip_encoders):
        modules = getattr(family.pipe, part).named_modules()
        name, layer = next(
            (name, module) for name, module in modules if isinstance(module, BaseTunerLayer)
        )
        a, b, x = (
            layer.lora_A["default"],
            layer.lora_B["default"],
            torch.randn(3, layer.in_features),
        )
        nn.init.normal_(b.weight)
        update = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(update, scale * b(a(x)), rtol=1e-4, atol=1e-4, msg=part)
        written = lora_state(getattr(family.pipe, part))
        product = written[f"{name}.lora_B.weight"] @ written[f"{name}.lora_A.weight"]
        torch.testing.assert_close(update, x @ product.T, rtol=1e-4, atol=1e-4, msg=part)


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (2, 3, 7, 6)])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", True)]
)
def test_a_lora_layer_in_training_gives_the_output_and_gradients_of_pefts_own(
    shape, dtype, autocast
):
    torch.manual_seed(0)
    base = nn.Linear(6, 5).to(getattr(torch, dtype)).requires_grad_(False)
    layer = LoraLinear(base, "default", PeftConfig(init_lora_weights=False), r=3, lora_alpha=5)
    for parameter in trainable_parameters(layer).values():
        parameter.data = parameter.data.float()
    x, toward, found = torch.randn(shape), torch.randn(*shape[:-1], 5), []
    for forward in (layer, partial(lora_layer.Linear.forward, layer)):
        given = x.clone().to(base.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(given)
        layer.zero_grad()
        y.backward(toward.to(y.dtype))
        found.append([y, given.grad, *(p.grad for p in trainable_parameters(layer).values())])
    close = {"rtol": 0.02, "atol": 0.05} if autocast else {}
    torch.testing.assert_close(found[0], found[1], **close)


def test_a_blocks_name_is_not_the_beginning_of_anothers():
    blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(1, 1)}) for _ in range(11)])
    found = target_layers(
        nn.ModuleDict({"blocks": blocks}),
        LoraConfig(target_modules=["to_q"], blocks=["blocks.1"]),
        {},
    )
    assert found == ["blocks.1.to_q"]


UNMET = {
    "an ending": (
        "sd3",
        ("lora.target_modules=[to_k, to_qq]",),
        r"lora\.target_modules: .*'to_qq'.*\bto_q \(3\)",
    ),
    "a regex": (
        "flux",
        ("lora.target_modules=proj_mpl",),
        r"lora\.target_modules: 'proj_mpl'.*\bproj_mlp \(2\)",
    ),
    "a block": (
        "flux",
        ("lora.blocks=[single_transformer_blocks.0, single_transformer_blocks.7]",),
        r"lora\.blocks: .*'single_transformer_blocks\.7'.*\bsingle_transformer_blocks\.1 \(3\)",
    ),
    "a block without such layers": (
        "sd3",
        ("lora.blocks=[transformer_blocks.1]", "lora.target_modules=[attn2.to_q]"),
        r"lora\.blocks: none of the 1 layers is in "
        r"'transformer_blocks\.1'.*\btransformer_blocks\.0 \(1\)",
    ),
}


@pytest.mark.parametrize(("name", "overrides", "message"), UNMET.values(), ids=UNMET)
def test_an_unmet_wish_is_told_with_names_that_are_near_and_their_counts(
    adapted, name, overrides, message
):
    with pytest.raises(UserError, match=message):
        adapted(name, *overrides)


@pytest.mark.parametrize("name", FLOWS)
def test_the_file_has_peft_names_and_clips_keep_their_level(settings, tmp_path, name):
    """ComfyUI and kohya's readers know CLIP by `text_model.`, which transformers 5 dropped from one
    of its classes."""
    task, _, _ = dreambooth.build(
        settings(TEXT, "lora.target_modules=attention+mlp", family=name), Accelerator(cpu=True)
    )
    task.save(tmp_path)
    layers = {f"transformer.{layer}" for layer in ATTENTION[name] | MLP[name]}
    for encoder in ("text_encoder", "text_encoder_2") if name == "sd3" else ("text_encoder",):
        for i in (0, 1):
            block = f"{encoder}.text_model.encoder.layers.{i}.self_attn"
            layers |= under(block, "q_proj", "k_proj", "v_proj", "out_proj")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"
        }


# What does not fit

REFUSED = [
    ("sd15", "objective.shift=2", r"objective\.shift: .*flux, sd3"),
    ("sd15", "objective.precondition=true", r"objective\.precondition: .*flux, sd3"),
    ("sd15", "model.max_sequence_length=10", r"model\.max_sequence_length: .*flux, sd3"),
    ("sd15", "data.resolution=20", r"data\.resolution: .*multiple of 8, not 20"),
    ("sd3", "objective.noise_offset=0.1", r"objective\.noise_offset: .*sd15"),
    ("sd3", "model.guidance_scale=3.5", r"model\.guidance_scale: .*flux"),
    ("sd3", "data.resolution=24", r"data\.resolution: .*multiple of 16, not 24"),
    ("flux", "objective.snr_gamma=5", r"objective\.snr_gamma: .*sd15"),
    ("flux", "model.text_encoder_3=null", r"model\.text_encoder_3: .*sd3"),
    ("flux", "data.resolution=24", r"data\.resolution: .*multiple of 16, not 24"),
]


@pytest.mark.parametrize(
    ("name", "override", "message"), REFUSED, ids=[f"{name} {key}" for name, key, _ in REFUSED]
)
def test_what_means_nothing_to_a_family_is_refused(settings, name, override, message):
    with pytest.raises(UserError, match=message):
        settings(override, family=name)


def test_sizes_that_only_flux_and_sd3_cannot_cut_are_fine_for_sd15(settings):
    assert settings("data.resolution=24").data.resolution == 24


# Memory


@pytest.fixture
def loads(monkeypatch):
    """For each load: the parts that were still in memory before it, and those that it brought."""
    seen, parts, load = [], [], Family.load

    def noted(family, *names):
        gc.collect()
        alive = {name for name, part in parts if part() is not None}
        load(family, *names)
        parts.extend((name, weakref.ref(getattr(family.pipe, name))) for name in names)
        seen.append((alive, set(names)))

    monkeypatch.setattr(Family, "load", noted)
    return seen


ONCE = (
    "data.class_prompt=c",
    "data.num_class_images=1",
    "validation.prompts=[a b c]",
    "train.max_train_steps=1",
)


@pytest.mark.parametrize("text", [(), (TEXT,)], ids=["denoiser", "and text encoders"])
@pytest.mark.parametrize("name", ALL)
def test_no_text_encoder_is_in_memory_with_the_denoiser_unless_it_trains(
    settings, loads, name, text
):
    """From class pictures to the last sample: encoders load one at a time, and whatever loads finds
    memory empty."""
    config = settings(*ONCE, *text, family=name)
    run(config)
    family = FAMILIES[name](config.model)
    frozen = set(family.text_encoder_names) - set(family.clip_encoders if text else ())
    for alive, brought in loads:
        assert not alive, loads
        assert not frozen & brought if family.denoiser_name in brought else len(brought) == 1, loads
    assert (
        sum(family.denoiser_name in brought for _, brought in loads) == 3
    )  # class pictures, training, proof
    assert frozen <= {part for _, brought in loads for part in brought}


def test_a_t5_that_is_left_out_is_never_loaded(settings, loads):
    run(
        settings(
            "model.text_encoder_3=null", "data.cache=false", "train.max_train_steps=1", family="sd3"
        )
    )
    assert {"text_encoder", "text_encoder_2"} <= set.union(*(brought for _, brought in loads))
    assert not any("text_encoder_3" in brought for _, brought in loads)


# Runs


def test_a_family_that_nobody_uses_any_more_lets_its_weights_go(settings):
    """A cache of its methods held every family of the process, and with it a denoiser on the
    GPU."""
    config = settings()
    family = FAMILIES["sd15"](config.model)
    family.load("unet")
    assert (family.vae_scale_factor, family.component_digest("unet")) == (
        2,
        family.component_digest("unet"),
    )
    weights = weakref.ref(family.denoiser.conv_in.weight)
    del family
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("name", ALL)
def test_a_base_of_another_family_is_refused(settings, bases, name):
    other = {"sd15": "sd3", "sd3": "flux", "flux": "sd15"}[name]
    wrong = settings(f"model.pretrained_model_name_or_path={bases[other]}", family=name)
    with pytest.raises(UserError, match=FAMILIES[other].pipeline.__name__):
        run(wrong)


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
    assert family.make_objective(config.objective, 16).shift == 1.0


@pytest.mark.parametrize("name", FLOWS)
def test_three_steps_and_three_more_equal_six(settings, tmp_path, name):
    overrides = (
        "train.ema_decay=0.9",
        "lora.dropout=0.1",
        TEXT,
        f"data.cache_dir={tmp_path}/cache",
    )
    straight = settings(*overrides, f"output_dir={tmp_path}/straight", family=name)
    parts = settings(*overrides, f"output_dir={tmp_path}/parts", family=name)
    run(straight)
    run(parts.model_copy(update={"train": parts.train.model_copy(update={"max_train_steps": 3})}))
    run(parts)
    assert losses(straight) == losses(parts)
    assert lora(straight).keys() == lora(parts).keys()
    assert all(torch.equal(lora(straight)[key], lora(parts)[key]) for key in lora(straight))


@pytest.mark.parametrize("name", FLOWS)
def test_accumulation_equals_one_batch(settings, tmp_path, name):
    shared = (*PRIOR, f"data.class_data_dir={tmp_path}/class", f"data.cache_dir={tmp_path}/cache")
    one = settings("train.train_batch_size=2", *shared, f"output_dir={tmp_path}/one", family=name)
    parts = ("train.train_batch_size=1", "train.gradient_accumulation_steps=2")
    two = settings(*parts, *shared, f"output_dir={tmp_path}/two", family=name)
    run(one)
    run(two)
    assert_trained_alike(
        (losses(one), losses(two)), (lora(one), lora(two)), one.optimizer.learning_rate
    )


@pytest.mark.parametrize("name", FLOWS)
def test_a_bfloat16_run_ends_with_weights_that_reload(settings, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    final = settings(
        *PRIOR, TEXT, "validation.prompts=[a b c]", "train.max_train_steps=2", family=name
    )
    run(final)
    assert all(tensor.dtype == torch.float32 for tensor in lora(final).values())


def test_the_final_samples_are_reproduced_by_plain_diffusers(settings, bases, tmp_path):
    """And they are not what the base draws."""
    script = ["import torch", "from diffusers import DiffusionPipeline"]
    finals = {}
    for name in FLOWS:
        overrides = (
            *PRIOR,
            TEXT,
            "lora.alpha=5",
            "validation.prompts=[a b c]",
            f"output_dir={tmp_path}/{name}",
        )
        finals[name] = settings(*overrides, family=name)
        run(finals[name])
        script += [f"pipe = DiffusionPipeline.from_pretrained({str(bases[name])!r})"]
        for kind in ("base", "lora"):
            script += (
                [f"pipe.load_lora_weights({str(finals[name].output_dir)!r})"]
                if kind == "lora"
                else []
            )
            script += [
                "image = pipe('a b c', height=16, width=16, num_inference_steps=2, "
                "guidance_scale=2,"
                f" max_sequence_length={LENGTH}, "
                f"generator=torch.Generator().manual_seed(0)).images[0]",
                f"image.save({str(tmp_path / f'{name}-{kind}.png')!r})",
            ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], check=True, capture_output=True)
    for name, final in finals.items():
        ours = Image.open(final.output_dir / "samples/final/00-0.png")
        assert ours.tobytes() == Image.open(tmp_path / f"{name}-lora.png").tobytes(), name
        assert ImageChops.difference(ours, Image.open(tmp_path / f"{name}-base.png")).getbbox(), (
            name
        )
