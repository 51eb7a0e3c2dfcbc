"""What a tokenizer, and the embedding of its text encoder, know about a word."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainers.data.caption_checks import WordTokens

WORD_END = "</w>"  # of tokens that end a word, in CLIP's vocabulary
EMBEDDING = "token_embedding.weight"  # as CLIP's files name it
NUM_NEAREST = 3
SHORTEST_WORD = 3  # letters; shorter tokens are parts of words and initials


def split_word(tokenizer: PreTrainedTokenizerBase, word: str, folder: Path) -> WordTokens:
    """How a tokenizer splits a word; folder: of its text encoder's weights."""
    ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
    pieces = tuple(tokenizer.decode([token]).strip() for token in ids)
    has_unknown = tokenizer.unk_token_id in ids
    # CLIP's vocabulary is in the order in which its tokens were merged, the most frequent first
    is_one = len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids)[0].endswith(WORD_END)
    if not is_one:
        return WordTokens(pieces, has_unknown)
    nearest = nearest_words(tokenizer, ids[0], folder)
    return WordTokens(pieces, has_unknown, ids[0] / len(tokenizer), nearest)


def nearest_words(tokenizer: PreTrainedTokenizerBase, token: int, folder: Path) -> tuple[str, ...]:
    """The words whose embeddings have the largest cosine with that of a token, the nearest first;
    () where the folder's files hold no embedding that can be read."""
    weight = read_embedding(folder)
    if weight is None or token >= len(weight):
        return ()
    cosines = F.cosine_similarity(weight.float(), weight[token].float(), dim=1)  # (V,)
    words = []
    for other in cosines.argsort(descending=True).tolist():
        text = tokenizer.convert_ids_to_tokens(other) if other < len(tokenizer) else ""
        word = text.removesuffix(WORD_END)
        is_word = text != word and word.isalpha() and len(word) >= SHORTEST_WORD
        if is_word and other != token:
            words.append(word)
        if len(words) == NUM_NEAREST:
            break
    return tuple(words)


def read_embedding(folder: Path) -> Tensor | None:
    """The matrix (V, C) of a CLIP's tokens, from its file alone."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                name = next((key for key in names if key.endswith(EMBEDDING)), None)
                if name:
                    return file.get_tensor(name)
        except (OSError, SafetensorError):
            continue
    return None
