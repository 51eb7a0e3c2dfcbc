"""What a LoRA learned, in numbers: samples of it that the judge reads, and a held-out loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from reference import step
from trainers.config import DreamBoothConfig
from trainers.families import FAMILIES

from .judge import Judge
from .world import (
    BACKGROUNDS,
    CLASS_PROMPT,
    CLASSES,
    HELD_OUT_SEED,
    INSTANCE_PROMPT,
    PATTERNS,
    SIZE,
    Thing,
    pick,
    plain_thing,
    subject,
    subject_images,
    to_pixels,
)

NUM_HELD_OUT = 20
LOSS_DRAWS = 12


@dataclass(frozen=True)
class Measurement:
    """Metrics by name, the pictures that they were read from by row, and features of one row.

    Those are the features (n, features) of the pictures of the class.
    """

    metrics: dict[str, float]
    pictures: dict[str, list[Image.Image]]
    class_features: Tensor


def load_pipeline(config: DreamBoothConfig, lora: bool) -> DiffusionPipeline:
    """The run's base, with its LoRA if wanted, by diffusers alone."""
    base = config.model.pretrained_model_name_or_path
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    if lora:
        pipeline.load_lora_weights(config.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_samples(
    pipeline: DiffusionPipeline,
    judge: Judge,
    config: DreamBoothConfig,
    base: Measurement | None = None,
    n: int = 24,
) -> Measurement:
    """Sample four rows of n pictures and let the judge read them.

    Most metrics are rates, 0..1. Those that compare with `base` are 0 without it, or 1 for ratios.

    `loss`: of held-out pictures of the subject; `loss_ratio`: over the base's.
    `star`, `colours`, `stripes`, `face`, their mean `attributes`: of the subject, asked for by the
    instance prompt.
    `cosine`: mean cosine of those pictures to held-out pictures of the subject; `cosine_gain`: over
    the base's.
    `edit`: the background that was asked for together with the subject; `edit_attributes`: what is
    left of the subject.
    `leak`: stripes or a face under the class prompt; `class_star`: a star there; `drift`: how far
    the mean unit feature moved from the base's, 0..2.
    `other_shape`, `other_colour`, `other_background`: plain objects of the other classes, as
    captioned.
    """
    rng, shapes = np.random.default_rng(0), [name for name in CLASSES if name != "star"]
    others = [replace(plain_thing(rng), shape=pick(shapes, rng)) for _ in range(n)]
    edits = [subject(list(BACKGROUNDS)[i % len(BACKGROUNDS)]) for i in range(n)]
    pictures, labels, features = {}, {}, {}
    for i, (row, prompts) in enumerate(make_prompts(edits, others).items()):
        pictures[row] = sample(pipeline, config, prompts, 1000 * i)
        labels[row], features[row] = judge.read(pictures[row])
    metrics = subject_metrics(labels["subject"])
    held_out = judge.read(subject_images(NUM_HELD_OUT, HELD_OUT_SEED))[1]
    metrics["cosine"] = float((features["subject"] @ held_out.T).mean())
    metrics["loss"] = held_out_loss(pipeline, config)
    metrics["loss_ratio"] = metrics["loss"] / base.metrics["loss"] if base else 1.0
    metrics["cosine_gain"] = metrics["cosine"] - base.metrics["cosine"] if base else 0.0
    metrics["edit"] = agreement(labels["edit"], edits)["background"]
    metrics["edit_attributes"] = subject_metrics(labels["edit"])["attributes"]
    metrics |= class_metrics(labels["class"])
    moved = features["class"].mean(0) - base.class_features.mean(0) if base else torch.zeros(())
    metrics["drift"] = float(moved.norm())
    metrics |= {f"other_{name}": rate for name, rate in agreement(labels["other"], others).items()}
    return Measurement(metrics, pictures, features["class"])


def make_prompts(edits: Sequence[Thing], others: Sequence[Thing]) -> dict[str, list[str]]:
    """The prompts of each row, as many as there are things in each."""
    return {
        "subject": [INSTANCE_PROMPT] * len(edits),
        "edit": [f"{INSTANCE_PROMPT} {thing.background}" for thing in edits],
        "class": [CLASS_PROMPT] * len(edits),
        "other": [f"a photo of a {it.color} {it.shape} {it.background}" for it in others],
    }


def sample(
    pipeline: DiffusionPipeline, config: DreamBoothConfig, prompts: list[str], first_seed: int
) -> list[Image.Image]:
    """A picture of each prompt.

    Each has a generator of its own, so that it does not depend on its neighbors.
    """
    seeds = range(first_seed, first_seed + len(prompts))
    length = max_sequence_length(config)
    return pipeline(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **({} if length is None else {"max_sequence_length": length}),
    ).images


def max_sequence_length(config: DreamBoothConfig) -> int | None:
    """How many tokens the T5 reads; None without one."""
    family = FAMILIES[config.model.family]
    if family.long_encoder is None:
        return None
    tokens = family.facts.text_encoders[family.long_encoder].tokens
    return config.model.max_sequence_length or tokens


@torch.no_grad()
def held_out_loss(pipeline: DiffusionPipeline, config: DreamBoothConfig) -> float:
    """The training loss on held-out pictures of the subject, at fixed times and noise.

    It is computed by diffusers' own parts.
    """
    pictures = subject_images(NUM_HELD_OUT, HELD_OUT_SEED)
    pixels = to_pixels(np.stack([np.asarray(picture) for picture in pictures]))
    family, vae = config.model.family, pipeline.vae
    x0 = vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0)
    x0 = x0 * vae.config.scaling_factor
    text = []
    for part in step.encode(pipeline, family, INSTANCE_PROMPT, max_sequence_length(config)):
        text.append(part.expand(len(x0), *part.shape[1:]))
    denoiser = pipeline.unet if family == "sd15" else pipeline.transformer
    rng, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(LOSS_DRAWS):
        eps = torch.randn(x0.shape, generator=rng)
        t = torch.randint(1000, (len(x0),), generator=rng)
        # the flows count time from 0 to 1
        t = t if family == "sd15" else t / 1000
        x_t, target = step.corrupt(family, pipeline.scheduler.config, x0, eps, t)
        prediction = step.call_denoiser(family, denoiser, x_t, t, text)
        total += F.mse_loss(prediction, target).item()
    return total / LOSS_DRAWS


def subject_metrics(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The judge's indices (B,) per head -> rates of the subject's attributes, and their mean."""
    star, purple, _, stripes, yellow, _ = subject("on sand").labels()
    pair = torch.stack([labels["colour"], labels["colour2"]]).sort(0).values
    expected = torch.tensor(sorted((purple, yellow)))[:, None]
    metrics = {
        "star": rate(labels["shape"] == star),
        "colours": rate((pair == expected).all(0)),
        "stripes": rate(labels["pattern"] == stripes),
        "face": rate(labels["face"] == 1),
    }
    return metrics | {"attributes": sum(metrics.values()) / len(metrics)}


def class_metrics(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of the subject is in pictures of the class, and whether it still is the class."""
    is_striped = labels["pattern"] == PATTERNS.index("stripes")
    has_face = labels["face"] == 1
    is_star = labels["shape"] == CLASSES.index("star")
    return {"leak": rate(is_striped | has_face), "class_star": rate(is_star)}


def agreement(labels: Mapping[str, Tensor], things: Sequence[Thing]) -> dict[str, float]:
    """How often the judge reads the shape, color and background of the things asked for."""
    expected = torch.tensor([thing.labels() for thing in things])
    names = ("shape", "colour", "background")
    return {name: rate(labels[name] == expected[:, i]) for i, name in enumerate(names)}


def rate(hits: Tensor) -> float:
    return float(hits.float().mean())
