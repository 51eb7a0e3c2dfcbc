"""What a user should know about the captions of a run, and of its trigger word, before it trains.

Of the trigger nothing is said where the config names none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trainers.config import DreamBoothConfig
from trainers.config.trigger import mentions
from trainers.data.caption_variants import SEPARATOR, distinct_texts
from trainers.data.intake import Intake
from trainers.data.pictures import Picture
from trainers.errors import name_some

MANY_TEXTS = 2000
# A vocabulary is in the order of frequency: sks stands at 0.97 of CLIP's, corgi at 0.63. Beyond
# this, rare words and parts of words mix, so that nothing can be said.
KNOWN_PLACE = 0.8


@dataclass(frozen=True)
class WordTokens:
    """How a tokenizer splits a word.

    place: in 0..1, where in its vocabulary the word stands, the most frequent first; None for
    several tokens, or a vocabulary in another order. nearest: the words with the most similar
    embeddings, for one token.
    """

    pieces: tuple[str, ...]
    has_unknown: bool = False
    place: float | None = None
    nearest: tuple[str, ...] = ()


class SplitsWords(Protocol):
    """What a family knows about words."""

    text_encoder_names: Sequence[str]

    def split_word(self, name: str, word: str) -> WordTokens: ...


def check_captions(intake: Intake, pictures: Sequence[Picture], config: DreamBoothConfig) -> None:
    """Note how many texts the captions of the pictures to learn become, and which lack the
    trigger."""
    captions = {caption for picture in pictures for caption in picture.captions}
    if several := sum(bool(picture.other_captions) for picture in pictures):
        intake.note(f"{several} pictures have several captions: each visit draws one")
    texts = distinct_texts(pictures, config.seed)
    if len(texts) > max(len(captions), MANY_TEXTS):
        intake.note(
            f"{len(captions)} captions become {len(texts)} texts, each of which is encoded once: "
            "fewer data.caption_variants need less time and disk"
        )
    elif len(texts) != len(captions):
        intake.note(
            f"{len(captions)} captions become {len(texts)} texts by shuffled or dropped tags "
            "(data.caption_variants for each)"
        )
    if config.data.varies_tags:
        plain = [p for p in pictures if not any(SEPARATOR in caption for caption in p.captions)]
        names = name_some([picture.short_name for picture in plain])
        if len(plain) == len(pictures):
            intake.warn("no caption has a comma, so there are no tags to shuffle or drop")
        elif plain:
            intake.note(f"captions without a comma have no tags to shuffle or drop: {names}")
    for photos in config.data.sets:
        if photos.trigger:
            own = [picture for picture in pictures if picture.concept == photos.name]
            check_trigger(intake, own, photos.trigger, config)


def check_trigger(
    intake: Intake, pictures: Sequence[Picture], trigger: str, config: DreamBoothConfig
) -> None:
    """Warn of captions without the trigger, and of prompts of the class that have it."""
    lacking = []
    for picture in pictures:
        if not all(mentions(caption, trigger) for caption in picture.captions):
            lacking.append(picture.short_name)
    has_any = any(mentions(c, trigger) for picture in pictures for c in picture.captions)
    if not has_any:
        intake.warn(
            f"no caption has the trigger {trigger!r}, so nothing teaches it: write {{trigger}} in "
            "data.instance_prompt or in the captions, or set data.caption_prefix to it"
        )
    elif lacking:
        intake.warn(
            f"{len(lacking)} of {len(pictures)} pictures have a caption without the trigger "
            f"{trigger!r}: {name_some(lacking)}"
        )
    for key in ("class_prompts", "preserve_prompts"):
        if any(mentions(prompt, trigger) for prompt in getattr(config.data, key)):
            intake.warn(
                f"data.{key.replace('class_prompts', 'class_prompt')} has the trigger {trigger!r}: "
                "prior preservation would keep it from being learnt; write the class alone"
            )
    prompts = config.validation.texts
    if prompts and not any(mentions(prompt, trigger) for prompt in prompts):
        intake.note(f"no prompt of validation.prompts has the trigger {trigger!r}")


def check_tokens(intake: Intake, family: SplitsWords, trigger: str) -> None:
    """Note how the tokenizers split the trigger; warn of what makes it hard to learn."""
    names_by_split: dict[WordTokens, list[str]] = {}
    for name in family.text_encoder_names:
        names_by_split.setdefault(family.split_word(name, trigger), []).append(name)
    for tokens, names in names_by_split.items():
        readers, count = " and ".join(names), len(tokens.pieces)
        shown = f"{count} tokens ({' '.join(tokens.pieces)})" if count != 1 else "one token"
        near = f", most like {', '.join(tokens.nearest)}" if tokens.nearest else ""
        intake.note(f"the trigger {trigger!r} is {shown} of {readers}{near}")
        digits = [piece for piece in tokens.pieces if piece.isdigit()]
        if digits and not trigger.isdigit():
            intake.warn(
                f"digits of the trigger {trigger!r} are tokens of their own to {readers}, which "
                "means numbers by them: a word of letters is learnt faster"
            )
        if tokens.has_unknown:
            intake.warn(
                f"{readers} has no token for characters of the trigger {trigger!r}, and reads them "
                "as unknown: write it in Latin letters"
            )
        if tokens.place is not None and tokens.place < KNOWN_PLACE:
            intake.warn(
                f"the trigger {trigger!r} is a word that the base knows: {readers} has it among "
                f"the {tokens.place:.0%} most frequent of its vocabulary. The training changes "
                "what it means; a rare word such as sks or ohwx has little to unlearn"
            )
