"""The trigger word: what stands for it in prompts and captions, and where a text mentions it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from trainers.errors import UserError

PLACEHOLDERS = ("{trigger}", "[trigger]")
# the keys whose texts may hold a placeholder
PROMPT_KEYS = {
    "data": (
        "instance_prompt",
        "class_prompt",
        "preserve_prompts",
        "caption_prefix",
        "caption_suffix",
    ),
    "validation": ("prompts", "negative_prompt"),
}
# those of them that every concept shares, though each may have its own trigger
SHARED_KEYS = ("caption_prefix", "caption_suffix")


def has_placeholder(text: str) -> bool:
    return any(placeholder in text for placeholder in PLACEHOLDERS)


def fill_trigger(text: str, trigger: str) -> str:
    """The text with the trigger in place of each placeholder; without one it is left as it is."""
    for placeholder in PLACEHOLDERS if trigger else ():
        text = text.replace(placeholder, trigger)
    return text


def fill_given(texts: Iterable[str], trigger: str | None) -> list[str]:
    """As `fill_trigger`, for prompts of a command line. Raises: UserError without a trigger."""
    filled = [fill_trigger(text, trigger or "") for text in texts]
    for text in filled:
        if has_placeholder(text):
            raise UserError(
                f"{text!r} has a place for the trigger word, and the run's config has no "
                "data.trigger: write the word itself"
            )
    return filled


def mentions(text: str, trigger: str) -> bool:
    """Whether the trigger is in a text as whole words, whatever its case."""
    pattern = rf"(?<!\w){re.escape(trigger)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def fill_prompts(tree: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config, not validated yet, with the trigger in place of placeholders.

    What concepts share keeps its placeholders: each concept has its trigger there.
    """
    data = tree.get("data")
    trigger = data.get("trigger") if isinstance(data, dict) else None
    if not isinstance(trigger, str) or has_placeholder(trigger):
        return tree
    filled = dict(tree)
    for section, keys in PROMPT_KEYS.items():
        values = tree.get(section)
        if isinstance(values, dict):
            kept = SHARED_KEYS if values.get("concepts") else ()
            own = [key for key in keys if key in values and key not in kept]
            texts = {key: fill_value(values[key], trigger) for key in own}
            filled[section] = values | texts
    return filled


def fill_value(value: Any, trigger: str) -> Any:
    """A text, a list of them, or a prompt with settings; what is none of these is left for pydantic
    to refuse."""
    if isinstance(value, str):
        return fill_trigger(value, trigger)
    if isinstance(value, dict):
        texts = {key: value[key] for key in ("prompt", "negative_prompt") if key in value}
        return value | {key: fill_value(text, trigger) for key, text in texts.items()}
    return [fill_value(part, trigger) for part in value] if isinstance(value, list) else value
