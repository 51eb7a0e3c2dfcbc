"""Rules between the keys of captions, as (path, message) of each that is broken."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.config.base_rules import Errors
from trainers.config.base_sections import Section
from trainers.config.dreambooth_data import DataConfig
from trainers.config.sample_prompts import SamplePrompt, as_settings
from trainers.config.trigger import PROMPT_KEYS, SHARED_KEYS, has_placeholder


def caption_errors(data: DataConfig) -> Errors:
    yield from trigger_errors(data.trigger)
    if not data.varies_tags:
        keys = {"keep_tags": 0, "caption_variants": type(data)().caption_variants}
        for key, default in keys.items():
            if getattr(data, key) != default:
                message = (
                    "has no effect, because no tags move: set data.shuffle_tags or "
                    "data.tag_dropout, or remove it"
                )
                yield f"data.{key}", message


def trigger_errors(trigger: str | None, path: str = "data.trigger") -> Errors:
    """path: the key that has it."""
    if trigger is None:
        return
    if not trigger.strip() or trigger != trigger.strip():
        message = f"{trigger!r} is no word: write it without spaces around it, or null"
        yield path, message
    elif "," in trigger:
        message = f"{trigger!r} has a comma, which separates tags: write it without one"
        yield path, message
    elif has_placeholder(trigger):
        message = f"{trigger!r} stands for the trigger itself: write the word, such as sks"
        yield path, message


def placeholder_errors(data: DataConfig, validation: Section) -> Errors:
    """Prompts with a place for the trigger, and no trigger."""
    if data.trigger is not None:
        return
    all_have_own = all(photos.trigger for photos in data.sets)
    sections = {"data": data, "validation": validation}
    for section, keys in PROMPT_KEYS.items():
        for key in keys:
            if key in SHARED_KEYS and all_have_own:
                continue
            texts = texts_of(getattr(sections[section], key))
            if found := next((text for text in texts if has_placeholder(text)), None):
                message = f"{found!r} has a place for the trigger word: set it by data.trigger"
                yield f"{section}.{key}", message


def texts_of(value: str | list[str | SamplePrompt] | None) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        return
    for sample in as_settings(value or ()):
        yield sample.prompt
        yield sample.negative_prompt or ""
