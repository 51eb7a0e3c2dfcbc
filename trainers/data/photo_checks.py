"""The photos of a DreamBooth run, and what its user should know about them before it trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from accelerate import Accelerator

from trainers.config import DreamBoothConfig
from trainers.data.buckets import (
    MAX_ASPECT,
    BucketRule,
    concept_shares,
    enlargement,
    name_size,
    share_cut_off,
)
from trainers.data.caption_checks import SplitsWords, check_captions, check_tokens
from trainers.data.intake import Intake, check_batch_size
from trainers.data.masks import check_masks
from trainers.data.photo_likeness import find_blurred, find_copies, find_near_copies
from trainers.data.photo_sets import load_held_out_pictures, load_instance_pictures
from trainers.data.pictures import Picture
from trainers.errors import UserError, name_some
from trainers.run_folder import CACHE, PICTURES_NAME

ROUNDING = 1e-6
LARGE_CROP = 0.35  # a loss beyond that of the 3:2 pictures of cameras
NOTED_CROP = 0.1


class CountsTokens(SplitsWords, Protocol):
    """What a family knows about the length of prompts, and about words."""

    def load(self) -> None:
        """Load the tokenizers."""

    def unload(self) -> None: ...

    def count_tokens(self, name: str, prompt: str) -> tuple[int, int, str]:
        """How many tokens a prompt has, how many a text encoder reads, and the text of the rest."""


def load_photos(
    config: DreamBoothConfig, accelerator: Accelerator, rule: BucketRule
) -> tuple[Intake, list[list[Picture]], list[Picture]]:
    """What is known about the photos; those to learn, as the first pool; those that are held out.

    Raises: UserError, as the loaders and `check_photos`.
    """
    data, intake = config.data, Intake(config.data.strict)
    intake.memory.load((data.cache_dir or config.output_dir / CACHE) / PICTURES_NAME)
    pictures = load_instance_pictures(data, intake)
    held_out = load_held_out_pictures(data, intake)
    check_photos(intake, pictures, held_out, rule)
    check_settings(intake, pictures, config, rule, accelerator.num_processes)
    return intake, [pictures], held_out


def report(
    intake: Intake,
    family: CountsTokens,
    pictures: Iterable[Picture],
    config: DreamBoothConfig,
    accelerator: Accelerator,
) -> None:
    """Print and save what is known, the length of captions and prompts too.

    Raises: UserError for warnings when data.strict is true.
    """
    family.load()
    check_texts(intake, family, pictures, config)
    family.unload()
    if accelerator.is_main_process:
        intake.save(config.output_dir)
    if accelerator.is_local_main_process:
        intake.memory.save()
    intake.report(accelerator.print)


def check_texts(
    intake: Intake,
    family: CountsTokens,
    pictures: Iterable[Picture],
    config: DreamBoothConfig,
) -> None:
    """Note what the loaded family makes of the triggers, and texts that are longer than it
    reads."""
    for trigger in config.data.triggers:
        check_tokens(intake, family, trigger)
    captions = {}
    for picture in pictures:
        captions |= dict.fromkeys(picture.captions, picture.short_name)
    check_lengths(intake, family, "captions", captions)
    prompts = [
        *config.data.kept_prompts,
        *config.validation.texts,
        *config.validation.negative_texts,
    ]
    named = {prompt: repr(shorten(prompt, 24)) for prompt in prompts}
    check_lengths(intake, family, "prompts", named)


def check_photos(
    intake: Intake,
    pictures: Sequence[Picture],
    held_out: Sequence[Picture],
    rule: BucketRule,
) -> None:
    """Note what is unusual about the photos to learn. Raises: UserError where photos that are held
    out are learnt from, or where one is too small."""
    sizes = sorted((picture.facts.size for picture in pictures), key=lambda size: size[0] * size[1])
    smallest, largest = (name_size(size) for size in (sizes[0], sizes[-1]))
    between = smallest if smallest == largest else f"{smallest} to {largest}"
    counts = Counter(size for picture in pictures for size in rule.sizes(picture))
    learnt = [name_size(size) for size in sorted(counts)]
    if len(counts) > 1:
        learnt = [f"{name_size(size)} ({counts[size]})" for size in sorted(counts)]
    intake.note(f"pictures are {between}, and are learnt as {name_some(learnt, 8)}")
    if pictures[0].concept:
        parts = [f"{name} {share:.0%}" for name, share in concept_shares(pictures, rule).items()]
        intake.note(f"of the pictures of a step: {name_some(parts, 20)}")
    if len(pictures) == 1:
        intake.warn("there is one picture: 5 to 30 teach a subject, one teaches a picture")
    check_small(intake, pictures, rule)
    if moving := [p.short_name for p in pictures if p.facts.storage.has_more_frames]:
        intake.warn(f"of several frames or pages the first is used: {name_some(moving)}")
    check_duplicates(intake, pictures, held_out)
    check_blur(intake, pictures)


def check_settings(
    intake: Intake,
    pictures: Sequence[Picture],
    config: DreamBoothConfig,
    rule: BucketRule,
    num_processes: int,
) -> None:
    """Note what of the config does not suit the photos to learn."""
    # random squares show all of a picture in time
    if config.data.buckets or config.data.center_crop:
        check_crops(intake, pictures, rule)
    check_batch_size(intake, config.train, num_processes, len(pictures))
    check_masks(intake, pictures, config.data.mask_floor)
    check_captions(intake, pictures, config)


def check_small(intake: Intake, pictures: Sequence[Picture], rule: BucketRule) -> None:
    """Name pictures that are enlarged, or that are learnt at a smaller area."""
    enlarged, smaller = [], []
    for picture in pictures:
        own, size = picture.facts.size, rule.sizes(picture)[0]
        name = f"{picture.short_name} ({name_size(own)})"
        if enlargement(own, size) > 1 + ROUNDING:
            enlarged.append(name)
        if rule.is_reduced(picture):
            smaller.append(f"{name} as {name_size(size)}")
    side = rule.resolutions[0]
    if enlarged:
        intake.warn(f"smaller than data.resolution={side}, so enlarged: {name_some(enlarged)}")
    if smaller:
        intake.warn(
            f"too small for data.resolution={side} by data.max_upscale={rule.max_upscale:g}: "
            f"{name_some(smaller)}"
        )


def check_duplicates(
    intake: Intake, pictures: Sequence[Picture], held_out: Sequence[Picture]
) -> None:
    """Raises: UserError for a held-out photo with the pixels of one to learn."""
    if copies := find_copies(pictures):
        text = "the same picture more than once, so it counts more"
        intake.warn(f"{text}: {name_some(name_pairs(copies))}")
    if copies := find_near_copies(pictures):
        text = "nearly the same picture more than once, so it counts more"
        intake.warn(f"{text}: {name_some(name_pairs(copies))}")
    first = {picture.facts.fingerprint: picture.short_name for picture in reversed(pictures)}
    both = []
    for picture in held_out:
        if other := first.get(picture.facts.fingerprint):
            both.append(f"{picture.short_name} = {other}")
    if both:
        text = f"these photos are learnt from, so they measure nothing: {name_some(both)}"
        error = f"data.held_out_dir: {text}; remove them from one of the two folders"
        intake.fail(UserError(error))


def name_pairs(copies: Mapping[Picture, Picture]) -> list[str]:
    return [f"{one.short_name} = {other.short_name}" for one, other in copies.items()]


def check_blur(intake: Intake, pictures: Sequence[Picture]) -> None:
    """Name pictures in which nothing is sharp."""
    if names := [picture.short_name for picture in find_blurred(pictures)]:
        intake.warn(
            f"blurred, and blur is learnt too: {name_some(names)}: leave them out, unless they "
            "are meant so"
        )


def check_crops(intake: Intake, pictures: Sequence[Picture], rule: BucketRule) -> None:
    """Note how much of the pictures lies outside of what is learnt."""
    losses = []
    for picture in pictures:
        own, sizes = picture.facts.size, rule.sizes(picture)
        aspect = max(own) / min(own)
        cut_off = max(share_cut_off(own, size) for size in sizes)
        losses.append((cut_off, picture.short_name, aspect))
    worst, name, aspect = max(losses)
    if worst < NOTED_CROP:
        return
    mean = sum(loss for loss, _, _ in losses) / len(losses)
    remedy = "cut them around the subject yourself"
    # of small pictures the sizes are few
    shape = "of a shape between those of the sizes"
    if aspect > MAX_ASPECT:
        shape = f"more than {MAX_ASPECT} times as long as wide"
    if not rule.enabled:
        remedy, shape = "set data.buckets=true", "cut to squares"
    text = f"{shape}, pictures lose {mean:.0%} on average and up to {worst:.0%} ({name}): {remedy}"
    if worst > LARGE_CROP:
        intake.warn(text)
    else:
        intake.note(text)


def check_lengths(
    intake: Intake, family: CountsTokens, what: str, names: Mapping[str, str]
) -> None:
    """Note texts that are longer than the text encoders read; a warning if none reads their end.

    names: of the texts, for the message.
    """
    unread: list[str] = []
    num_cut: Counter[str] = Counter()
    for text, name in names.items():
        longest, counts = "", (0, 0, "")
        is_read = False
        for encoder in family.text_encoder_names:
            total, limit, rest = family.count_tokens(encoder, text)
            if total <= limit:
                is_read = True
                continue
            num_cut[f"{encoder}, which reads {limit} tokens"] += 1
            if limit > counts[1]:
                longest, counts = encoder, (total, limit, rest)
        if not is_read and longest:
            total, limit, rest = counts
            cut = f"{total} tokens, and {longest} reads {limit}"
            unread.append(f"{name} ({cut}; not read: {shorten(rest)!r})")
    if unread:
        intake.warn(f"{what} that no text encoder reads to their end: {name_some(unread, 3)}")
    elif num_cut:
        parts = [f"{count} by {encoder}" for encoder, count in num_cut.items()]
        intake.note(f"{what} are cut, and read whole by another encoder: {', '.join(parts)}")


def shorten(text: str, most: int = 60) -> str:
    """The end of a text."""
    text = text.strip()
    return text if len(text) <= most else f"...{text[-most:]}"
