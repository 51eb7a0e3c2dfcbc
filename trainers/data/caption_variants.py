"""The texts that captions become: what stands around them, and their tags in other orders.

Each text is a pure function of the caption, the seed and the number of the variant, so that texts
can be encoded before the training; which of them a visit sees depends on (seed, step, row).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from trainers.config import DataConfig
from trainers.config.trigger import fill_trigger, has_placeholder, mentions
from trainers.data.rng import derive_seed
from trainers.errors import UserError

Visit = tuple[int, int, int]  # seed, step and row of the global batch
SEPARATOR = ","  # of tags
CLOSING = ",.;:!?"  # a suffix that begins with one of these has no space before it


class Captioned(Protocol):
    """What a picture tells of its texts."""

    captions: tuple[str, ...]
    wording: Wording


@dataclass(frozen=True)
class Wording:
    """How a picture's captions become texts; the default leaves them as they are.

    prefix and suffix stay in their places. Of the tags between them the first `keep` stay too, and
    neither these nor those with the trigger are dropped.
    """

    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    shuffle: bool = False
    keep: int = 0
    dropout: float = 0.0
    variants: int = 1

    @classmethod
    def from_config(cls, data: DataConfig, trigger: str | None = None) -> Wording:
        """trigger: of a concept; None: that of all."""
        trigger = trigger or data.trigger or ""
        return cls(
            prefix=fill_trigger(data.caption_prefix, trigger),
            suffix=fill_trigger(data.caption_suffix, trigger),
            trigger=trigger,
            shuffle=data.shuffle_tags,
            keep=data.keep_tags,
            dropout=data.tag_dropout,
            variants=data.caption_variants if data.varies_tags else 1,
        )

    @property
    def unvaried(self) -> Wording:
        """The same with every tag in its place."""
        return replace(self, shuffle=False, dropout=0.0, variants=1)

    @property
    def head(self) -> str:
        return f"{self.prefix.rstrip()} " if self.prefix else ""

    @property
    def tail(self) -> str:
        suffix = self.suffix.lstrip()
        return suffix if suffix.startswith(tuple(CLOSING)) or not suffix else f" {suffix}"

    def complete(self, caption: str, name: str = "") -> str:
        """A caption with its trigger, prefix and suffix.

        name: of its picture, for the message. Raises: UserError for a place of the trigger, and no
        trigger.
        """
        text = fill_trigger(caption, self.trigger)
        if has_placeholder(text):
            raise UserError(
                f"{name}: the caption {caption!r} has a place for the trigger word: set it by "
                "data.trigger, or write the word itself"
            )
        return f"{self.head}{text}{self.tail}"

    def complete_all(self, captions: Sequence[str | None], name: str) -> list[str | None]:
        """As `complete`; None where there is no caption."""
        return [None if text is None else self.complete(text, name) for text in captions]

    def text(self, caption: str, seed: int, variant: int) -> str:
        """Variant number `variant` of a caption that is `complete`."""
        if not (self.shuffle or self.dropout):
            return caption
        middle = caption.removeprefix(self.head).removesuffix(self.tail)
        tags = [tag.strip() for tag in middle.split(SEPARATOR) if tag.strip()]
        key = seed, caption, variant
        kept, free = tags[: self.keep], tags[self.keep :]
        moving = [tag for i, tag in enumerate(free) if not self.drops(tag, key, i)]
        if self.shuffle:
            # not `rng.permutation`, which remembers the orders of whole epochs
            generator = random.Random(derive_seed(*key, "tag order"))
            moving = generator.sample(moving, len(moving))
        text = f"{SEPARATOR} ".join([*kept, *moving])
        # without tags, no comma that separated them
        return f"{self.head if text else self.head.rstrip(', ')}{text}{self.tail}"

    def drops(self, tag: str, key: tuple[int, str, int], number: int) -> bool:
        """Whether a variant lacks a tag that is not kept."""
        if self.trigger and mentions(tag, self.trigger):
            return False
        return derive_seed(*key, "tag", number) < self.dropout * 2**63


AS_WRITTEN = Wording()


def every_text(captions: Sequence[str], wording: Wording, seed: int) -> dict[str, None]:
    """The distinct texts that visits of a picture may see, in the order of their first draw."""
    variants = range(wording.variants)
    return dict.fromkeys(wording.text(c, seed, v) for c in captions for v in variants)


def distinct_texts(pictures: Iterable[Captioned], seed: int) -> dict[str, None]:
    """As `every_text`, of several pictures."""
    texts = {}
    for captions, wording in {(p.captions, p.wording): None for p in pictures}:
        texts |= every_text(captions, wording, seed)
    return texts


def draw_text(captions: Sequence[str], wording: Wording, visit: Visit) -> str:
    """The text of one visit: one caption of the picture, in one variant."""
    caption = captions[derive_seed(*visit, "which caption") % len(captions)]
    variant = derive_seed(*visit, "tags") % wording.variants
    return wording.text(caption, visit[0], variant)


def subject_prompts(data: DataConfig) -> list[str]:
    """The instance prompt of each set that has one, as its photos' captions have it."""
    sets = [photos for photos in data.sets if photos.instance_prompt]
    return [
        Wording.from_config(data, photos.trigger).complete(photos.instance_prompt)
        for photos in sets
    ]
