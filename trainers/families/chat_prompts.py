"""Prompts as a language model is told them: the words of a user, between the marks of a chat."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

PLACE = "~"  # stands for a prompt where only what surrounds it is asked for


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Mapping[str, bool]) -> str:
    """The text that the language model reads; settings: of the tokenizer's chat template."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **settings
    )


def count_chat_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Mapping[str, bool], length: int
) -> tuple[int, int, str]:
    """How many tokens a prompt has with what comes before it, how many of `length` are read, and
    the text of the others.

    What comes after the prompt is the first to be cut off, and says nothing of it.
    """
    ids = tokenizer(chat_text(tokenizer, prompt, settings), verbose=False).input_ids
    ending = chat_text(tokenizer, PLACE, settings).rpartition(PLACE)[2]
    own = ids[: len(ids) - len(tokenizer(ending, verbose=False).input_ids)]
    return len(own), length, tokenizer.decode(own[length:])
