"""What every family is compared with: the plain diffusers pipelines and what they compute."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from trainers.efficiency.apply import open_family

FLOWS = ("sd3", "flux")
UNETS = ("sd15", "sdxl")
ALL = (*UNETS, *FLOWS)
TEXT = "train.train_text_encoder=true"
LENGTH = 10  # of the T5, as the fixture `settings` has it
FACTOR = 2  # pixels per latent of the tiny autoencoders


@pytest.fixture(scope="session")
def pipes(bases):
    """Family name -> the plain pipeline, to look at and to call."""
    return LoadedPipelines(bases)


class LoadedPipelines(dict):
    """Each is loaded when it is first asked for."""

    def __init__(self, bases):
        super().__init__()
        self.bases = bases

    def __missing__(self, name):
        self[name] = DiffusionPipeline.from_pretrained(self.bases[name])
        return self[name]


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
    if isinstance(pipe, StableDiffusionXLPipeline):
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}
    if isinstance(pipe, StableDiffusion3Pipeline):
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **length
        )
    else:
        states, pooled, _ = pipe.encode_prompt(prompts, **length)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


PROMPTS = ["a b c", "", "a prompt that is longer than any of the text encoders reads"]


def pipeline_steps(pipe, name, height, width):
    """Latents (2, C, h, w), times and outputs of the denoiser in a pipeline's two steps."""
    inputs, outputs = [], []

    def record(_, args, kwargs, output):
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0])

    call = {} if name in UNETS else {"max_sequence_length": LENGTH}
    denoiser = pipe.unet if name in UNETS else pipe.transformer
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
    return x_t, times if name in UNETS else times / 1000, v
