"""Whether our step is the step of the papers: its loss and its gradients beside a reference's.

Shared are the latents' moments or the photos as they were cut, and the uniform and normal numbers.
The reference has its own autoencoder, text encoders, denoiser and PEFT layers, and makes the times
and the noisy latents itself. LoRA's alpha is not the rank, so that a scale that is lost shows.

In half precision a third step, in float32, has the same weights and inputs. How far a step is from
it: the relative difference of the loss, and that of the gradients (the norm of their difference
over the norm of float32's), each the root of the mean square over some batches. The cosine alone
would not see a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmark.sizes import PROMPT, RANK, TARGETS
from reference import step
from trainers.config import DreamBoothConfig
from trainers.data.crops import choose_crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.dreambooth import DreamBooth

ALPHA = RANK // 2
NUM_BATCHES = 3
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# how many times as far from float32 as the reference ours may be
FARTHER = 1.5

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Bounds:
    """What may differ: the loss and the gradients' length, relatively; the gradients' cosine."""

    loss: float
    length: float
    cosine: float


BOUNDS = {
    "no": Bounds(1e-6, 1e-5, 0.99999),
    "bf16": Bounds(1e-3, 2e-2, 0.999),
    "fp16": Bounds(2e-4, 5e-3, 0.9999),
}


@dataclass(frozen=True)
class Inputs:
    """What a step computes from: x0 and eps (B, C, h, w), t (B,), text as of `step.encode`."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    text: Sequence[Tensor]


@dataclass(frozen=True)
class Outcome:
    """The loss of a step, and its LoRA gradients in a row, in float64."""

    loss: float
    gradient: Tensor

    def loss_difference(self, other: Outcome) -> float:
        return abs(self.loss / other.loss - 1)

    def length_difference(self, other: Outcome) -> float:
        return abs((self.gradient.norm() / other.gradient.norm()).item() - 1)

    def gradient_difference(self, other: Outcome) -> float:
        return ((self.gradient - other.gradient).norm() / other.gradient.norm()).item()

    def cosine(self, other: Outcome) -> float:
        return F.cosine_similarity(self.gradient, other.gradient, dim=0).item()


@dataclass
class Reference:
    """A denoiser of diffusers with PEFT's LoRA layers, and what its steps compute from."""

    family: str
    denoiser: nn.Module
    scheduler: dict[str, Any]  # its config
    inputs: Sequence[Inputs]

    def add_lora(self, weights: Parameters) -> Parameters:
        """Put LoRA of these float32 weights, by PEFT's names, into the denoiser."""
        self.denoiser.requires_grad_(False).train()
        step.add_lora(self.denoiser, RANK, TARGETS[self.family], ALPHA)
        trained = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            parameter.data = weights[name].detach().clone()
        return trained

    def outcomes(self, dtype: torch.dtype, scale: float = 1.0) -> Iterator[Outcome]:
        """The steps in a precision; scale: of the loss, which a GradScaler multiplies by it."""
        if dtype == torch.float32:
            self.denoiser.float()
        trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        device = trained[0].device.type
        for given in self.inputs:
            x_t, target = step.corrupt(self.family, self.scheduler, given.x0, given.eps, given.t)
            text = [part.to(dtype) for part in given.text]
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                output = step.call_denoiser(
                    self.family, self.denoiser, x_t.to(dtype), given.t, text
                )
            loss = F.mse_loss(output.float(), target)
            (scale * loss).backward()
            yield Outcome(loss.item(), take_gradient(trained, scale))


def take_gradient(trained: Iterable[nn.Parameter], scale: float) -> Tensor:
    """The gradients in a row without the scale of the loss; the parameters have none after."""
    trained = list(trained)
    joined = torch.cat([parameter.grad.flatten().double() for parameter in trained]) / scale
    for parameter in trained:
        parameter.grad = None
    return joined


def parity(
    settings: DreamBoothConfig,
    task: DreamBooth,
    batches: DreamBoothBatches,
    accelerator: Accelerator,
    has_float32: bool = True,
) -> dict[str, Any]:
    """How far our steps on the photos are from those of a pipeline of its own, see `compare`."""
    base = settings.model.pretrained_model_name_or_path
    pipe = DiffusionPipeline.from_pretrained(base, dtype=task.family.dtype)
    pipe.vae.float()
    pipe.to(accelerator.device)
    given = [
        photo_inputs(settings, pipe, batches, number, accelerator.device)
        for number in range(NUM_BATCHES)
    ]
    family = settings.model.family
    denoiser = pipe.unet if family == "sd15" else pipe.transformer
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not denoiser:
            part.cpu()
    reference = Reference(family, denoiser, dict(pipe.scheduler.config), given)
    return compare(task, batches, reference, accelerator, has_float32)


def compare(
    task: DreamBooth,
    batches: DreamBoothBatches,
    reference: Reference,
    accelerator: Accelerator,
    has_float32: bool = True,
) -> dict[str, Any]:
    """Whether loss and LoRA gradients of our first steps equal those of the reference's.

    The reference's denoiser has our frozen weights and no LoRA yet. has_float32: whether in half
    precision both are also held against a step in float32, which takes twice the weights' memory.
    """
    weights = trainable_parameters(task.module.denoiser)
    move_from_zero(weights)
    copies = reference.add_lora(weights)
    precision = accelerator.mixed_precision
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
    # in the reference's order; where their names differ, nothing is equal
    if weights.keys() != copies.keys():
        return {"equal": False, "names": sorted(weights.keys() ^ copies.keys())}
    ordered = [weights[name] for name in copies]
    # without TF32, which PyTorch allows in convolutions, float32 is float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = list(our_outcomes(task, batches, ordered, accelerator, scale))
        theirs = list(reference.outcomes(DTYPES[precision], scale))
        exact = []
        if has_float32 and precision != "no":
            exact = list(reference.outcomes(torch.float32))
    return judge(ours, theirs, exact, precision)


def our_outcomes(
    task: DreamBooth,
    batches: DreamBoothBatches,
    ordered: Sequence[nn.Parameter],
    accelerator: Accelerator,
    scale: float,
) -> Iterator[Outcome]:
    task.module.train()
    for number in range(NUM_BATCHES):
        batch, rng = next(iter(batches(number)))
        ((_, loss),) = task.losses(batch, rng)
        accelerator.backward(loss)
        yield Outcome(loss.item(), take_gradient(ordered, scale))


def judge(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], exact: Sequence[Outcome], precision: str
) -> dict[str, Any]:
    """The differences, and whether all are within their bounds."""
    bounds = BOUNDS[precision]
    difference = max(map(Outcome.loss_difference, ours, theirs))
    length = max(map(Outcome.length_difference, ours, theirs))
    cosine = min(map(Outcome.cosine, ours, theirs))
    is_near = difference <= bounds.loss and length <= bounds.length and cosine >= bounds.cosine
    result = {
        "equal": is_near,
        "precision": precision,
        "loss": ours[0].loss,
        "loss_difference": difference,
        "length_difference": length,
        "gradient_cosine": cosine,
    }
    if not exact:
        return result
    for name, steps in (("ours", ours), ("theirs", theirs)):
        result[f"{name}_from_float32"] = {
            "loss": root_mean_square(list(map(Outcome.loss_difference, steps, exact))),
            "gradient": root_mean_square(list(map(Outcome.gradient_difference, steps, exact))),
        }
    far, allowed = result["ours_from_float32"], result["theirs_from_float32"]
    # a loss is one number, which the reference may hit by chance: within the bound nothing is told
    is_near = far["loss"] <= max(FARTHER * allowed["loss"], bounds.loss)
    result["equal"] &= is_near and far["gradient"] <= FARTHER * allowed["gradient"]
    return result


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def move_from_zero(parameters: Parameters) -> None:
    """Add noise to the weights: LoRA's B starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise.to(parameter.device)


@torch.no_grad()
def photo_inputs(
    settings: DreamBoothConfig,
    pipe: DiffusionPipeline,
    batches: DreamBoothBatches,
    number: int,
    device: torch.device,
) -> Inputs:
    """What the first micro-batch of a step is made of, by the pipeline's own parts."""
    _, rng = next(iter(batches(number)))
    again = SampleRng(settings.seed, number, rng.rows, device, rng.global_batch_size)
    family, length = settings.model.family, settings.model.max_sequence_length
    pixels = photo_pixels(settings, batches, number).to(device)
    moments = [pipe.vae.encode(picture[None]).latent_dist.parameters for picture in pixels]
    rows = [step.encode(pipe, family, PROMPT, length) for _ in pixels]
    text = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    configs = dict(pipe.vae.config), dict(pipe.scheduler.config)
    return make_inputs(settings, torch.cat(moments), text, again, *configs)


def make_inputs(  # noqa: PLR0913 (all that a step is made of)
    settings: DreamBoothConfig,
    moments: Tensor,
    text: Sequence[Tensor],
    rng: SampleRng,
    vae: dict[str, Any],
    scheduler: dict[str, Any],
) -> Inputs:
    """Draw x0 from moments (B, 2C, h, w) in the denoiser's units, the noise and the times.

    vae, scheduler: their configs. The draws are in the order that ours are in.
    """
    mean, logvar = moments.chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * rng.normal(mean.shape)
    x0 = (z - (vae.get("shift_factor") or 0)) * vae["scaling_factor"]
    eps = rng.normal(x0.shape)
    u = rng.uniform(settings.objective.stratified)
    t = step.draw_times(settings.model.family, scheduler, u, x0.shape[-1])
    return Inputs(x0, eps, t, text)


def photo_pixels(settings: DreamBoothConfig, batches: DreamBoothBatches, number: int) -> Tensor:
    """The photos (B, 3, S, S) of a step's first micro-batch, as the task cuts them."""
    pictures = {picture.name: picture for picture in batches.pools[0]}
    pixels, size = [], batches.bucket(number)[0].size
    for name in batches.sample_names(number)[0]:
        picture = pictures[name]
        pixels.append(choose_crop(picture, 0, size, settings.data)(picture.decode()))
    return torch.stack(pixels)
