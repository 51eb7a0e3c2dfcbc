"""The judge of the small world: a network that reads pictures, and the figures that say whether a
LoRA learned.

The judge has seen every pattern and face, and never gives a training signal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from trainers.config import DreamBoothConfig
from trainers.families import FAMILIES

from .world import (
    ASSETS,
    BACKGROUNDS,
    CLASS_PROMPT,
    CLASSES,
    COLORS,
    HELD_OUT_SEED,
    INSTANCE_PROMPT,
    PATTERNS,
    SIZE,
    TRAINING_SEED,
    pick,
    plain_thing,
    subject,
    subject_images,
)

# The gate: figure -> (least, most) that passes. A LoRA trained with prior preservation must meet
# PRIOR; one trained
# without it must meet CONTRAST, which shows that it is the prior that preserves.
LEARN = {"loss_ratio": (0.0, 0.75), "cosine_gain": (0.60, 2.0), "attributes": (0.75, 1.0)}
PRIOR = {"leak": (0.0, 0.25), "class_star": (0.75, 1.0), "drift": (0.0, 0.60)}
CONTRAST = {"leak": (0.75, 1.0), "drift": (0.80, 2.0)}


class Judge(ModelMixin, ConfigMixin):
    """Reads a picture: one linear head per attribute on a common feature vector, which also serves
    for cosines.

    `centre` (features,) is the mean feature of real pictures, subtracted before a cosine is taken.
    """

    HEADS = (
        ("shape", len(CLASSES)),
        ("colour", len(COLORS)),
        ("background", len(BACKGROUNDS)),
        ("pattern", len(PATTERNS)),
        ("colour2", len(COLORS)),
        ("face", 2),
    )

    @register_to_config
    def __init__(self, width: int = 24, features: int = 96):
        super().__init__()
        layers = []
        for c, d in pairwise((3, width, 2 * width, 4 * width)):
            layers += [
                nn.Conv2d(c, d, 3, padding=1, bias=False),
                nn.BatchNorm2d(d),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(4 * width * (SIZE // 8) ** 2, features), nn.ReLU()
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, values) for name, values in self.HEADS}
        )
        self.register_buffer("centre", torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """x (B, 3, SIZE, SIZE) in -1..1 -> logits per head (B, values), features (B, features)."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}, features

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        """-> the index read off by each head (B,), centred unit features (B, features)."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(
            0, 3, 1, 2
        )
        logits, features = self(pixels.to(self.device, self.dtype) / 127.5 - 1)
        return {name: values.argmax(1) for name, values in logits.items()}, F.normalize(
            features - self.centre, dim=1
        )


@dataclass(frozen=True)
class Measurement:
    """`metrics` by name, the `pictures` they were read from by row, and the features of the class
    row (n, features)."""

    metrics: dict[str, float]
    pictures: dict[str, list[Image.Image]]
    class_features: Tensor


def load_judge() -> Judge:
    return Judge.from_pretrained(ASSETS / "judge").float().eval()


def load_pipeline(config: DreamBoothConfig, lora: bool) -> DiffusionPipeline:
    """The run's base, with its LoRA if wanted, by diffusers alone."""
    pipeline = DiffusionPipeline.from_pretrained(
        config.model.pretrained_model_name_or_path, dtype=torch.float32
    )
    if lora:
        pipeline.load_lora_weights(config.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def held_out_loss(pipeline: DiffusionPipeline, length: dict[str, int], draws: int = 12) -> float:
    """The training loss on 20 held-out pictures of the subject, at fixed times and noise, in
    diffusers' own terms.

    length: {"max_sequence_length": L} where a T5 reads the prompt.
    """
    pictures = np.stack([np.asarray(picture) for picture in subject_images(20, HELD_OUT_SEED)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    x0 = pipeline.vae.encode(pixels).latent_dist.mode() - (pipeline.vae.config.shift_factor or 0)
    x0, rng, total = x0 * pipeline.vae.config.scaling_factor, torch.Generator().manual_seed(0), 0.0
    encode = partial(
        pipeline.encode_prompt,
        INSTANCE_PROMPT,
        device="cpu",
        num_images_per_prompt=len(x0),
        **length,
    )
    if isinstance(pipeline, StableDiffusionPipeline):
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        text = encode(do_classifier_free_guidance=False)[0]
    elif isinstance(pipeline, StableDiffusion3Pipeline):
        text = encode(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
    else:
        text = encode()
    for _ in range(draws):
        eps, t = (
            torch.randn(x0.shape, generator=rng),
            torch.randint(1000, (len(x0),), generator=rng),
        )
        if isinstance(pipeline, StableDiffusionPipeline):
            target = scheduler.get_velocity(x0, eps, t)
            prediction = pipeline.unet(scheduler.add_noise(x0, eps, t), t, text).sample
        else:
            sigma, target = t[:, None, None, None] / 1000, eps - x0
            prediction = velocity(pipeline, (1 - sigma) * x0 + sigma * eps, t, text)
        total += F.mse_loss(prediction, target).item() / draws
    return total


def velocity(
    pipeline: DiffusionPipeline, x_t: Tensor, t: Tensor, encoded: tuple[Tensor, ...]
) -> Tensor:
    """SD3's or Flux.1's, for latents x_t at t (B,) in 0..1000; encoded: what the pipeline makes of
    the prompt."""
    n, channels, h, w = x_t.shape
    if isinstance(pipeline, StableDiffusion3Pipeline):
        text, _, pooled, _ = encoded
        return pipeline.transformer(x_t, text, pooled, t).sample
    text, pooled, text_ids = encoded
    v = pipeline.transformer(
        pipeline._pack_latents(x_t, n, channels, h, w),
        text,
        pooled,
        t / 1000,
        pipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", x_t.dtype),
        text_ids,
        torch.ones(n),
    ).sample
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(v, h * factor, w * factor, factor)


def measure_samples(
    pipeline: DiffusionPipeline,
    judge: Judge,
    config: DreamBoothConfig,
    base: Measurement | None = None,
    n: int = 24,
    seed: int = 0,
) -> Measurement:
    """Samples four rows of n pictures and lets the judge read them. Most figures are rates, 0..1:

    `loss`: of held-out pictures of the subject; `loss_ratio`: over the base's.
    `star`, `colours`, `stripes`, `face`, their mean `attributes`: of the subject, asked for by the
    instance prompt.
    `cosine`: mean cosine of those pictures to 20 held-out pictures of the subject; `cosine_gain`:
    over the base's.
    `edit`: the background that was asked for together with the subject; `edit_attributes`: what is
    left of the subject.
    `leak`: stripes or a face under the class prompt; `class_star`: a star there; `drift`: how far
    the mean unit feature moved from the base's (0..2; without `base` this and the gain are 0).
    `other_shape`, `other_colour`, `other_background`: plain objects of the other classes, as
    captioned.
    """
    rng, shapes = np.random.default_rng(seed), [name for name in CLASSES if name != "star"]
    others = [replace(plain_thing(rng), shape=pick(shapes, rng)) for _ in range(n)]
    backgrounds = [list(BACKGROUNDS)[i % len(BACKGROUNDS)] for i in range(n)]
    rows = {
        "subject": [INSTANCE_PROMPT] * n,
        "edit": [f"{INSTANCE_PROMPT} {background}" for background in backgrounds],
        "class": [CLASS_PROMPT] * n,
        "other": [
            f"a photo of a {thing.color} {thing.shape} {thing.background}" for thing in others
        ],
    }
    family, validation = FAMILIES[config.model.family], config.validation
    length = {}
    if family.t5_encoder:
        tokens = family.facts.text_encoders[family.t5_encoder].tokens
        length["max_sequence_length"] = config.model.max_sequence_length or tokens

    def sample(prompts: list[str], first: int) -> list[Image.Image]:
        """Each picture has a generator of its own, so that it does not depend on its neighbours."""
        return pipeline(
            prompts,
            height=SIZE,
            width=SIZE,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            generator=[torch.Generator().manual_seed(first + i) for i in range(n)],
            **length,
        ).images

    pictures = {
        row: sample(prompts, 1000 * (seed + i)) for i, (row, prompts) in enumerate(rows.items())
    }
    read = {row: judge.read(images) for row, images in pictures.items()}

    labels, features = read["subject"]
    metrics = subject_metrics(labels)
    metrics["cosine"] = float(
        (features @ judge.read(subject_images(20, HELD_OUT_SEED))[1].T).mean()
    )
    metrics["loss"] = held_out_loss(pipeline, length)
    metrics["loss_ratio"] = metrics["loss"] / base.metrics["loss"] if base else 1.0
    metrics["cosine_gain"] = metrics["cosine"] - base.metrics["cosine"] if base else 0.0
    expected_backgrounds = torch.tensor(
        [subject(background).labels()[2] for background in backgrounds]
    )
    metrics["edit"] = _rate(read["edit"][0]["background"] == expected_backgrounds)
    metrics["edit_attributes"] = subject_metrics(read["edit"][0])["attributes"]
    labels, features = read["class"]
    metrics["leak"] = _rate(
        (labels["pattern"] == PATTERNS.index("stripes")) | (labels["face"] == 1)
    )
    metrics["class_star"] = _rate(labels["shape"] == CLASSES.index("star"))
    metrics["drift"] = (
        float((features.mean(0) - base.class_features.mean(0)).norm()) if base else 0.0
    )
    expected_labels = torch.tensor([thing.labels() for thing in others])
    for i, name in enumerate(("shape", "colour", "background")):
        metrics[f"other_{name}"] = _rate(read["other"][0][name] == expected_labels[:, i])
    return Measurement(metrics, pictures, features)


def subject_metrics(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The judge's indices (B,) per head -> rates of the subject's four attributes, and their
    mean."""
    star, purple, _, stripes, yellow, _ = subject("on sand").labels()
    pair = torch.stack([labels["colour"], labels["colour2"]]).sort(0).values
    metrics = {
        "star": _rate(labels["shape"] == star),
        "colours": _rate((pair == torch.tensor(sorted((purple, yellow)))[:, None]).all(0)),
        "stripes": _rate(labels["pattern"] == stripes),
        "face": _rate(labels["face"] == 1),
    }
    return metrics | {"attributes": sum(metrics.values()) / len(metrics)}


def _rate(hits: Tensor) -> float:
    return float(hits.float().mean())


def gate(metrics: Mapping[str, float], prior: bool = True) -> dict[str, bool]:
    """Which lines of the gate pass."""
    limits = LEARN | (PRIOR if prior else CONTRAST)
    return {
        name: minimum <= metrics[name] <= maximum for name, (minimum, maximum) in limits.items()
    }


def format_gate(
    base: Mapping[str, float], tuned: Mapping[str, float], passed: Mapping[str, bool]
) -> str:
    """Every figure before and after, with the gate's limits."""
    limits = LEARN | (PRIOR if "class_star" in passed else CONTRAST)
    lines = [f"{'':18}{'base':>8}{'LoRA':>8}   gate"]
    for name, value in tuned.items():
        minimum, maximum = limits.get(name, (0, 0))
        line = (
            f"{minimum:.2f} .. {maximum:.2f}  {'passed' if passed[name] else 'FAILED'}"
            if name in passed
            else ""
        )
        lines.append(f"{name:18}{base[name]:8.3f}{value:8.3f}   {line}".rstrip())
    return "\n".join(lines)


def before_after_grid(
    base: Measurement, tuned: Measurement, columns: int = 8, scale: int = 4
) -> Image.Image:
    """A labelled sheet: the training pictures, then each row of the base above the same seeds with
    the LoRA."""
    rows = {"training pictures": subject_images(5, TRAINING_SEED)}
    titles = (INSTANCE_PROMPT, "... and a background", CLASS_PROMPT, "other classes")
    for row, title in zip(base.pictures, titles, strict=True):
        rows |= {f"{title}\nbase": base.pictures[row], f"{title}\nLoRA": tuned.pictures[row]}
    tile, margin = SIZE * scale, 230
    sheet = Image.new("RGB", (margin + columns * (tile + 4), len(rows) * (tile + 4)), "white")
    font = ImageFont.load_default(18)
    for y, (title, pictures) in enumerate(rows.items()):
        top = y * (tile + 4)
        ImageDraw.Draw(sheet).multiline_text((8, top + tile // 3), title, fill="black", font=font)
        for x, picture in enumerate(pictures[:columns]):
            sheet.paste(
                picture.resize((tile, tile), Image.Resampling.NEAREST),
                (margin + x * (tile + 4), top),
            )
    return sheet
