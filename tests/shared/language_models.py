"""Families whose prompts a language model reads: their pipelines' own calls, and what they show."""

import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline

from tests.shared.families import FACTOR

READ_BY_LANGUAGE_MODELS = ("flux2_klein", "z_image")
TOKENS = 40  # of which a chat's marks take the first and the last
LENGTH = f"model.max_sequence_length={TOKENS}"
STEPS = 50  # by which a pipeline may choose its shift


def pipeline_calls(pipe, prompt="a b c", size=(16, 24), sigmas=(0.9, 0.4)):
    """What the pipeline's own call gives its transformer and its scheduler: latents (1, C, h, w),
    times in (0, 1) and velocities, a row for each of its steps."""
    seen = {"x_t": [], "t": [], "v": []}
    step = pipe.scheduler.step

    def note_step(v, t, x_t, **options):
        for name, value in (("x_t", x_t), ("t", t.view(1) / 1000), ("v", v)):
            seen[name].append(value)
        return step(v, t, x_t, **options)

    pipe.scheduler.step = note_step
    try:
        pipe(
            prompt=prompt,
            height=size[0],
            width=size[1],
            num_inference_steps=STEPS,
            sigmas=list(sigmas),
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            max_sequence_length=TOKENS,
        )
    finally:
        del pipe.scheduler.step
    rows = {name: torch.cat(values) for name, values in seen.items()}
    if rows["x_t"].ndim == 3:
        h, w = (side // FACTOR // 2 for side in size)
        for name in ("x_t", "v"):
            patches = rows[name].mT.unflatten(2, (h, w))
            rows[name] = torch.nn.functional.pixel_shuffle(patches, 2)
    return rows["x_t"], rows["t"], rows["v"]


def velocity(pipe, x_t, t, prompts):
    """(B, C, h, w), by the pipeline's own encoding and helpers around its transformer."""
    return VELOCITIES[type(pipe)](pipe, x_t, t, prompts)


def flux2_klein_velocity(pipe, x_t, t, prompts):
    words, text_ids = pipe.encode_prompt(prompts, max_sequence_length=TOKENS)
    patches = pipe._patchify_latents(x_t)
    ids = pipe._prepare_latent_ids(patches)
    tokens = pipe.transformer(
        hidden_states=pipe._pack_latents(patches),
        timestep=t,
        encoder_hidden_states=words,
        txt_ids=text_ids,
        img_ids=ids,
    ).sample
    return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(tokens, ids))


def z_image_velocity(pipe, x_t, t, prompts):
    options = {"do_classifier_free_guidance": False, "max_sequence_length": TOKENS}
    words, _ = pipe.encode_prompt([*prompts], **options)
    frames = list(x_t.unsqueeze(2).unbind())
    v = pipe.transformer(frames, (1000 - 1000 * t) / 1000, words).sample
    return -torch.stack(v).squeeze(2)


VELOCITIES = {Flux2KleinPipeline: flux2_klein_velocity, ZImagePipeline: z_image_velocity}
