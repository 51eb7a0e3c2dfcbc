"""Prompts that are longer than CLIP reads, in chunks, as ComfyUI and A1111 encode them.

A prompt's tokens are cut after each 75, wherever that is; A1111 may move a cut back to a comma.
Each chunk is encoded alone, between its own marks of beginning and end, and the hidden states stand
one after another. Where a vector is made of the whole prompt, it is that of the first chunk. Every
prompt has the same number of chunks, the last ones empty where it is short.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

NUM_MARKS = 2  # of a chunk: its beginning and its end


def tokenize_chunks(tokenizer: PreTrainedTokenizerBase, prompt: str, chunks: int) -> Tensor:
    """The token ids (chunks x L,) of a prompt, L being what CLIP reads at a time."""
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    length = tokenizer.model_max_length
    size = length - NUM_MARKS
    ids = []
    for chunk in range(chunks):
        part = words[chunk * size : (chunk + 1) * size]
        marked = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        ids += marked + [tokenizer.pad_token_id] * (length - len(marked))
    return torch.tensor(ids)


def split_chunks(ids: Tensor, chunks: int) -> Tensor:
    """(B, chunks x L) as a batch of chunks (B x chunks, L)."""
    return ids.unflatten(1, (chunks, -1)).flatten(0, 1)


def join_chunks(outputs: dict[str, Tensor], chunks: int) -> dict[str, Tensor]:
    """Hidden states (B x chunks, L, C) become (B, chunks x L, C), and vectors (B x chunks, C) those
    (B, C) of the first chunks."""
    joined = {}
    for name, output in outputs.items():
        by_prompt = output.unflatten(0, (-1, chunks))  # (B, chunks, ...)
        joined[name] = by_prompt[:, 0] if output.ndim == 2 else by_prompt.flatten(1, 2)
    return joined
