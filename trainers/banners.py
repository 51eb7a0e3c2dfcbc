"""What a person reads before the first step and after the last one."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from trainers.config import ConceptConfig, Config, DreamBoothConfig, ScratchConfig
from trainers.config.dreambooth_rules import is_single_file
from trainers.data.buckets import BucketRule, class_shares, concept_shares, name_size
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.intake import NOT_USED, read_notes
from trainers.data.pictures import Picture
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import name_some
from trainers.from_scratch.image_sets import ImageBatches
from trainers.original.convert import diffusers_folder
from trainers.publishing.best import describe_best
from trainers.publishing.markdown import plain_text
from trainers.publishing.model_card import card_prompt
from trainers.publishing.readers import lora_readers
from trainers.run_folder import BEST, CARD_NAME, MODEL, PIPELINE, REPORT_NAME, WEIGHT_NAME
from trainers.training.loop import Batches, Task

DEVICE_NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
# by kind of run: the script that uses its result, with what follows the run folder
NEXT_SCRIPTS = {"autoencoder": "encode.py {run} PICTURES", "unet": "translate.py {run} PICTURES"}

# of the name of an adapter's weight: where that of its layer ends
PART_OF_LAYER = re.compile(r"\.(?:lora|lokr|hada)_")

Rows = Iterable[tuple[str, str]]


def start_banner(
    config: Config, task: Task, batches: Batches, accelerator: Accelerator, start: int
) -> str:
    """What the run is about to do, in about ten lines."""
    rows: list[tuple[str, str]] = []
    num_pictures = 0
    if isinstance(config, DreamBoothConfig) and isinstance(batches, DreamBoothBatches):
        rows += describe_photos(config, batches)
        num_pictures = sum(batches.counts)
    elif isinstance(config, ScratchConfig) and isinstance(batches, ImageBatches):
        num_pictures = len(batches.images)
        rows += [("pictures", f"{num_pictures} of {describe_source(config)}")]
    rows += describe_unused(config)
    rows += [
        ("resolution", describe_views(config, batches)),
        ("trained", describe_weights(config, task)),
        ("steps", describe_steps(config, batches, num_pictures, start)),
        ("batch", describe_batch(batches)),
        ("optimizer", describe_optimizer(config)),
        ("device", describe_device(config, accelerator)),
    ]
    if isinstance(config, DreamBoothConfig):
        rows.append(("memory", "python scripts/plan.py CONFIG tells the peak beforehand"))
    rows.append(("folder", f"{config.output_dir} ({REPORT_NAME} there shows the run live)"))
    return format_rows(f"{config.kind}, seed {config.seed}", rows)


def format_rows(title: str, rows: Rows) -> str:
    lines = [title]
    for name, text in rows:
        first, *more = text.splitlines() or [""]
        lines.append(f"  {name:<11} {first}")
        lines += [f"  {'':<11} {line}" for line in more]
    return "\n".join(lines)


def describe_photos(config: DreamBoothConfig, batches: DreamBoothBatches) -> Rows:
    """The photos, their captions and the class pictures."""
    data, photos = config.data, batches.pools[0]
    shares = concept_shares(photos, BucketRule.from_config(config))
    for concept in data.sets:
        own = [photo for photo in photos if photo.concept == concept.name]
        photos_text, captions = describe_set(concept, own)
        if data.concepts is None:
            yield from (("photos", photos_text), ("captions", captions))
        else:
            share = f"{shares[concept.name]:.0%} of what is learnt"
            yield concept.name, f"{photos_text}, {share}\ncaptions: {captions}"
    if num_masked := sum(photo.mask is not None for photo in photos):
        yield "masks", f"of {num_masked} photos; what they leave out counts {data.mask_floor:g}"
    weight = f"weight {data.prior_loss_weight:g}"
    if data.preserves_outputs:
        yield "kept", f"the base's outputs for {name_some(data.kept_prompts, 3)}, {weight}"
    elif data.class_sets:
        number, prompts = len(batches.pools[1]), len(data.class_prompts)
        text = f"{number} pictures of {count(prompts, 'prompt')}, {weight}"
        parts = class_shares(batches.buckets)
        named = [f"{name} {share:.0%}" for name, share in parts.items() if len(parts) > 1]
        yield "class", "\n".join([text, *([", ".join(named)] if named else [])])
    elif data.kept_prompts:
        yield "class", "not kept (data.prior=none)"


def describe_set(concept: ConceptConfig, photos: Sequence[Picture]) -> tuple[str, str]:
    """How many photos a set has and from where, and what captions they have."""
    names = {photo.name for photo in photos}
    prompt = concept.instance_prompt
    if prompt is not None:
        prompt = photos[0].wording.complete(prompt)
    own = {photo.name for photo in photos if photo.caption != prompt}
    texts = [f"{len(own)} of their own"] if own else []
    if len(own) < len(names):
        texts.append(f"{len(names) - len(own)} times {prompt!r}")
    return f"{len(names)} of {concept.source.name}", ", ".join(texts)


def describe_unused(config: Config) -> Rows:
    """What was found beside the pictures and is not used."""
    for note in read_notes(config.output_dir):
        # the name of a concept may stand before it
        if NOT_USED in note:
            yield "not used", note.replace(NOT_USED, "", 1)


def describe_source(config: ScratchConfig) -> str:
    data = config.data
    source = Path(data.image_dir or data.dataset_name or "").name
    return f"{source}, classes by {data.label_column}" if data.label_column else source


def describe_views(config: Config, batches: Batches) -> str:
    """The sizes of the pictures as they are trained on, and how they are varied."""
    data = config.data
    if isinstance(config, DreamBoothConfig) and isinstance(batches, DreamBoothBatches):
        sizes = [name_size(bucket.size) for bucket in batches.buckets]
        texts = [f"{len(sizes)} sizes: {name_some(sizes, 4)}" if len(sizes) > 1 else sizes[0]]
        texts.append("center crops" if data.center_crop else "random crops")
        if data.crop_jitter:
            texts.append(f"up to {data.crop_jitter:.0%} smaller")
        if data.color_jitter:
            texts.append(f"colors changed by up to {data.color_jitter:.0%}")
    else:
        texts = [f"{data.resolution} x {data.resolution}"]
        texts.append("gray" if data.channels == 1 else "color")
    if data.random_flip:
        texts.append("half of them mirrored")
    return ", ".join(texts)


def describe_weights(config: Config, task: Task) -> str:
    """What is trained, player by player."""
    texts = []
    for name, player in task.players.items():
        weights = trainable_parameters(player.module)
        number = f"{sum(weight.numel() for weight in weights.values()):,} parameters"
        if isinstance(config, DreamBoothConfig) and config.lora:
            num_layers = len({PART_OF_LAYER.split(weight)[0] for weight in weights})
            texts.append(f"{config.lora.title} in {num_layers} layers: {number}")
        else:
            texts.append(f"{name}: {number}")
    return ", ".join(texts)


def describe_steps(config: Config, batches: Batches, num_pictures: int, start: int) -> str:
    steps = config.train.max_train_steps
    text = f"{steps:,}"
    if num_pictures:
        epochs = steps * batches.batch_slice.global_batch_size / num_pictures
        text += f" = {epochs:.3g} epochs of {count(num_pictures, 'picture')}"
    return f"{text}, from step {start:,} on" if start else text


def describe_batch(batches: Batches) -> str:
    """How many pictures a step takes, and how they are shared out."""
    part = batches.batch_slice
    text = count(part.global_batch_size, "picture")
    if part.accumulation_steps * part.world_size == 1:
        return text
    processes = count(part.world_size, "process", "es")
    return f"{text} = {part.batch_size} x {part.accumulation_steps} accumulated x {processes}"


def describe_optimizer(config: Config) -> str:
    optimizer = config.optimizer
    text = f"{optimizer.name}, learning rate {optimizer.learning_rate:g} {optimizer.lr_scheduler}"
    if optimizer.lora_plus_ratio is not None:
        text += f", of lora_B {optimizer.lora_plus_ratio:g} times that"
    if optimizer.lr_warmup_steps:
        text += f", {count(optimizer.lr_warmup_steps, 'step')} of warm-up"
    return text


def describe_device(config: Config, accelerator: Accelerator) -> str:
    """The device and the precision that it computes in."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({platform.machine()}, {count(torch.get_num_threads(), 'thread')})"
    return f"{name}, {DEVICE_NAMES[config.train.mixed_precision]}"


def count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{'' if number == 1 else plural}"


def end_banner(config: Config, steps: int) -> str:
    """Where the result of so many steps is, how it is used, and what to do next."""
    run, quoted = config.output_dir, shlex.quote(str(config.output_dir))
    rows: list[tuple[str, str]] = []
    if isinstance(config, DreamBoothConfig):
        rows += describe_result(config)
        prompt = card_prompt(config) or "as in your captions"
        rows.append(("next", f"python scripts/generate.py {quoted} --prompt {shlex.quote(prompt)}"))
    else:
        rows.append(("model", f"{run / MODEL} (its code stands in {run / CARD_NAME})"))
        if script := NEXT_SCRIPTS.get(config.kind):
            rows.append(("next", f"python scripts/{script.format(run=quoted)}"))
    if best := describe_best(run, steps):
        rows.append(("best", f"{best}\n{run / BEST} has its weights, {quoted}@{BEST} names them"))
    rows += [("share", f"python scripts/push.py {quoted}"), ("report", f"{run / REPORT_NAME}")]
    return format_rows(f"done: {run}", rows)


def describe_result(config: DreamBoothConfig) -> Rows:
    """The file, and how diffusers and other programs load it."""
    run, base = config.output_dir, config.model.pretrained_model_name_or_path
    load = "pipe = DiffusionPipeline.from_pretrained"
    if config.lora is None:
        yield "model", f"{run / PIPELINE}"
        yield "diffusers", f'{load}("{run / PIPELINE}")'
        return
    yield "LoRA", f"{run / WEIGHT_NAME}"
    if is_single_file(base):
        # of what it is converted to, for it may lack parts that diffusers' own reader asks for
        base = str(diffusers_folder(config.model))
    if config.lora.type == "lora":
        yield "diffusers", f'{load}("{base}")\npipe.load_lora_weights("{run}")'
    yield "others", plain_text(lora_readers(config)).replace(" RUN ", f" {shlex.quote(str(run))} ")
