"""The photos of a DreamBooth run, and what its user should know about them before it trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from trainers.config import DreamBoothConfig
from trainers.data.intake import Intake, check_batch_size
from trainers.data.pictures import Picture, load_held_out_pictures, load_instance_pictures
from trainers.errors import UserError, name_some
from trainers.run_folder import CACHE, PICTURES_NAME

LARGE_CROP = 0.35  # a loss beyond that of the 3:2 pictures of cameras
NOTED_CROP = 0.1


class CountsTokens(Protocol):
    """What a family knows about the length of prompts."""

    text_encoder_names: Sequence[str]

    def load(self) -> None:
        """Load the tokenizers."""

    def unload(self) -> None: ...

    def count_tokens(self, name: str, prompt: str) -> tuple[int, int, str]:
        """How many tokens a prompt has, how many a text encoder reads, and the text of the rest."""


def load_photos(
    config: DreamBoothConfig, accelerator: Accelerator
) -> tuple[Intake, list[list[Picture]], list[Picture]]:
    """What is known about the photos; those to learn, as the first pool; those that are held out.

    Raises: UserError, as the loaders and `check_photos`.
    """
    data, intake = config.data, Intake(config.data.strict)
    intake.memory.load((data.cache_dir or config.output_dir / CACHE) / PICTURES_NAME)
    pictures = load_instance_pictures(data, intake)
    held_out = load_held_out_pictures(data, intake) if data.held_out_dir else []
    check_photos(intake, pictures, held_out, config, accelerator.num_processes)
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
    captions = {picture.caption: Path(picture.name).name for picture in pictures}
    check_lengths(intake, family, "captions", captions)
    prompts = [*config.data.class_prompts, *config.validation.prompts]
    named = {prompt: repr(shorten(prompt, 24)) for prompt in prompts}
    check_lengths(intake, family, "prompts", named)
    family.unload()
    if accelerator.is_main_process:
        intake.save(config.output_dir)
    if accelerator.is_local_main_process:
        intake.memory.save()
    intake.report(accelerator.print)


def check_photos(
    intake: Intake,
    pictures: Sequence[Picture],
    held_out: Sequence[Picture],
    config: DreamBoothConfig,
    num_processes: int,
) -> None:
    """Note what is unusual about the photos to learn. Raises: UserError where photos that are held
    out are learnt from."""
    names = {picture: Path(picture.name).name for picture in pictures}
    sizes = sorted((picture.facts.size for picture in pictures), key=lambda size: size[0] * size[1])
    smallest, largest = ("{} x {}".format(*size) for size in (sizes[0], sizes[-1]))
    between = smallest if smallest == largest else f"{smallest} to {largest}"
    resolution = config.data.resolution
    intake.note(f"pictures are {between}, and are learnt as {resolution} x {resolution}")
    if len(pictures) == 1:
        intake.warn("there is one picture: 5 to 30 teach a subject, one teaches a picture")
    check_batch_size(intake, config.train, num_processes, len(pictures))
    if small := [p for p in pictures if min(p.facts.size) < resolution]:
        shown = ["{} ({} x {})".format(names[p], *p.facts.size) for p in small]
        intake.warn(f"smaller than data.resolution={resolution}, so enlarged: {name_some(shown)}")
    if moving := [names[p] for p in pictures if p.facts.storage.has_more_frames]:
        intake.warn(f"of several frames or pages the first is used: {name_some(moving)}")
    check_duplicates(intake, pictures, held_out)
    if config.data.center_crop:
        check_crops(intake, pictures)


def check_duplicates(
    intake: Intake, pictures: Sequence[Picture], held_out: Sequence[Picture]
) -> None:
    """Raises: UserError for a held-out photo with the pixels of one to learn."""
    first: dict[str, str] = {}
    twice = []
    for picture in pictures:
        name, fingerprint = Path(picture.name).name, picture.facts.fingerprint
        if fingerprint in first:
            twice.append(f"{name} = {first[fingerprint]}")
        first.setdefault(fingerprint, name)
    if twice:
        intake.warn(f"the same picture more than once, so it counts more: {name_some(twice)}")
    both = []
    for picture in held_out:
        if other := first.get(picture.facts.fingerprint):
            both.append(f"{Path(picture.name).name} = {other}")
    if both:
        raise UserError(
            f"data.held_out_dir: these photos are learnt from, so they measure nothing: "
            f"{name_some(both)}; remove them from one of the two folders"
        )


def check_crops(intake: Intake, pictures: Sequence[Picture]) -> None:
    """Note how much of the pictures lies outside of the square in the middle."""
    losses = [(1 - min(p.facts.size) / max(p.facts.size), Path(p.name).name) for p in pictures]
    worst, name = max(losses)
    if worst < NOTED_CROP:
        return
    mean = sum(loss for loss, _ in losses) / len(losses)
    text = (
        f"cut to the square in the middle, pictures lose {mean:.0%} on average and up to "
        f"{worst:.0%} ({name}): cut them around the subject yourself, or set data.center_crop=false"
    )
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
