"""How a word is split, how known it is, and what is most like it, from tokenizer and file."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from tests.shared.families import ALL, whole
from tests.shared.tiny_pipelines import make_t5_tokenizer
from trainers.families.vocabulary import split_word
from trainers.run import run

WORDS = ("dog", "cat", "pup", "sks")


def merged(word):
    """The merges that make a word one token, letter by letter."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    merges = []
    while len(letters) > 1:
        merges.append((letters[0], letters[1]))
        letters[:2] = ["".join(letters[:2])]
    return merges


@pytest.fixture
def tokenizer():
    """A CLIP tokenizer with four words, the last of which was merged last."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [merge for word in WORDS for merge in merged(word)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.fixture
def weights(tokenizer, tmp_path):
    """A folder whose file has an embedding in which a pup is most like a dog."""
    embedding = torch.zeros(len(tokenizer), 4)
    embedding[:, 0] = -1
    rows = [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0.1, 0], [0, 0, 1, 1]
    for word, row in zip(WORDS, rows, strict=True):
        # the length of a row is no matter
        embedding[tokenizer.convert_tokens_to_ids(f"{word}</w>")] = 7 * torch.tensor(row)
    state = {"text_model.embeddings.token_embedding.weight": embedding.half()}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def test_a_word_of_the_vocabulary_has_its_place_and_its_nearest_words(tokenizer, weights):
    found = split_word(tokenizer, "dog", weights)
    assert found.pieces == ("dog",)
    assert found.place == tokenizer.convert_tokens_to_ids("dog</w>") / len(tokenizer)
    assert found.nearest == ("pup", "cat", "sks")
    assert split_word(tokenizer, "sks", weights).place > found.place
    assert split_word(tokenizer, "SKS", weights).nearest[0] == "cat"


def test_other_words_are_told_by_their_pieces(tokenizer, weights):
    found = split_word(tokenizer, "dog42", weights)
    assert found.pieces[-2:] == ("4", "2")
    assert found.place is None
    assert found.nearest == ()
    assert not found.has_unknown


def test_what_a_tokenizer_has_no_token_for_is_unknown(tmp_path):
    assert split_word(make_t5_tokenizer(), "犬", tmp_path).has_unknown
    assert not split_word(make_t5_tokenizer(), "dog", tmp_path).has_unknown


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_without_an_embedding_to_read_no_word_is_near(tokenizer, tmp_path, content):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert split_word(tokenizer, "dog", tmp_path).nearest == ()


@pytest.mark.parametrize("name", ALL)
def test_each_family_splits_by_the_tokenizers_of_its_encoders(settings, name):
    family = whole(settings(family=name))
    for encoder in family.text_encoder_names:
        found = family.split_word(encoder, "w42")
        assert "".join(found.pieces) == "w42"
        # a letter is one token of the tiny CLIPs
        place = family.split_word(encoder, "w").place
        assert (place is not None) == (encoder in family.clip_encoders)


def test_a_run_that_has_one_says_it_and_another_says_nothing(settings, capsys):
    short = ("train.max_train_steps=1", "data.instance_prompt=a b c")
    run(settings(*short))
    assert "trigger" not in capsys.readouterr().out
    output = settings().output_dir.with_name("triggered")
    run(settings(*short, "data.trigger=w42", f"output_dir={output}"))
    printed = capsys.readouterr().out
    assert "data: the trigger 'w42' is 3 tokens (w 4 2) of text_encoder" in printed
    assert "data: warning: digits of the trigger 'w42'" in printed
    assert "data: warning: no caption has the trigger 'w42'" in printed
