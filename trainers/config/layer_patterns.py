"""Regexes of users on names of layers: a bad one is one message, and a slow one is stopped."""

from __future__ import annotations

import math
import re

import regex

from trainers.config.family_facts import FamilyFacts
from trainers.errors import UserError

TIME_LIMIT = 1.0  # seconds for one name, which takes microseconds otherwise
MAX_REPETITIONS = 1000  # {n} within {m} is n x m of them, and `regex` writes them all out
COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# a range up to the last of all characters takes long to compile
RARE_CHARACTER = re.compile(r"\\[uUN]|[^\x20-\x7e]")


def fullmatch(pattern: str, name: str) -> bool:
    """Whether the regex is the whole name. Raises: UserError for a bad or a slow regex."""
    shown = pattern if len(pattern) < 80 else f"{pattern[:80]} ..."
    counts = [int(number) for pair in COUNT.findall(pattern) for number in pair if int(number or 0)]
    if math.prod(counts) > MAX_REPETITIONS:
        raise UserError(f"the regex {shown!r} repeats more than {MAX_REPETITIONS} times")
    if RARE_CHARACTER.search(pattern):
        raise UserError(f"the regex {shown!r} has characters that are in no layer's name")
    try:
        # for its errors: `regex` has more constructs, some of which need much memory
        re.compile(pattern)
        # for its time limit: it reads patterns as `re` does
        return regex.fullmatch(pattern, name, timeout=TIME_LIMIT) is not None
    except TimeoutError:
        message = f"the regex {shown!r} takes too long: it has repetitions within repetitions"
        raise UserError(message) from None
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise UserError(f"{shown!r} is not a valid regex: {error}") from None


def pattern_problem(pattern: str, facts: FamilyFacts) -> str | None:
    """What is wrong with a regex, as far as names like the family's show; None for nothing."""
    endings = [ending for endings in facts.lora_targets.values() for ending in endings]
    names = [f"{block}.10.attentions.0.{ending}_" for block in facts.blocks for ending in endings]
    try:
        for name in names:
            fullmatch(pattern, name)
    except UserError as error:
        return str(error)
    return None
