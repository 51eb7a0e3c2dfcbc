"""A prompt in several chunks is encoded as each chunk alone, and is read to its end."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModelWithProjection

from tests.shared.by_hand import by_hand_but
from tests.shared.families import TEXT, conditioned, whole
from tests.shared.runs import first_gradients, lora, losses, read_metrics
from tests.shared.tiny_pipelines import make_tokenizer
from trainers.data.encoder_cache import CachedEncoder
from trainers.errors import UserError
from trainers.families.long_prompts import tokenize_chunks
from trainers.run import run

FAMILIES = ("sd15", "sdxl", "sd3")
# here a token of CLIP is a letter, and it reads 12 with the marks of beginning and end
WORDS = "a b c d e f g h i j k l m n o".split()
LONG = " ".join(WORDS)
CHUNKS = [" ".join(WORDS[:10]), " ".join(WORDS[10:])]
TWO = "model.clip_chunks=2"


def by_hand(pipe, name, text):
    """The outputs of one text encoder of the plain pipeline for a text that it reads whole."""
    tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
    ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 12)
    encoder = getattr(pipe, name)
    if isinstance(pipe, StableDiffusionPipeline):
        return {name: encoder(ids)[0]}
    output = encoder(ids, output_hidden_states=True)
    states = {name: output.hidden_states[-2]}
    if isinstance(encoder, CLIPTextModelWithProjection):
        states[f"{name}_pooled"] = output.text_embeds
    return states


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_chunk_is_encoded_alone_and_the_first_gives_the_pooled_vector(settings, pipes, name):
    family, pipe = whole(settings(TWO, family=name)), pipes[name]
    for encoder in family.clip_encoders:
        first, second = (by_hand(pipe, encoder, chunk) for chunk in CHUNKS)
        ours = family.encode_prompt(encoder, LONG)
        assert ours.keys() == first.keys()
        expected = torch.cat([first[encoder], second[encoder]], 1)[0]  # (24, C)
        torch.testing.assert_close(ours[encoder], expected)
        if f"{encoder}_pooled" in ours:
            torch.testing.assert_close(ours[f"{encoder}_pooled"], first[f"{encoder}_pooled"][0])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_short_prompt_has_an_empty_chunk_and_one_chunk_is_what_it_was(settings, pipes, name):
    one, two = (whole(settings(*more, family=name)) for more in ((), (TWO,)))
    for encoder in one.clip_encoders:
        tokenizer = getattr(pipes[name], encoder.replace("text_encoder", "tokenizer"))
        for prompt in ("a b", "", CHUNKS[0]):
            ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[0]
            empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
            assert torch.equal(one.tokenize(encoder, prompt), ids)
            assert torch.equal(two.tokenize(encoder, prompt), torch.cat([ids, empty]))
            theirs = by_hand(pipes[name], encoder, prompt)
            ours = one.encode_prompt(encoder, prompt)
            assert all(torch.equal(ours[key], theirs[key][0]) for key in theirs)


def test_padding_is_the_tokenizers_own():
    """That of SD3's second CLIP is not the mark of the end."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "!"
    texts = [*CHUNKS, ""]
    expected = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id} & {*expected[1].tolist()}) == 2
    assert torch.equal(tokenize_chunks(tokenizer, LONG, 3), expected.flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_only_more_chunks_read_a_long_prompt_to_its_end(settings, name):
    one, two = (whole(settings(*more, family=name)) for more in ((), (TWO,)))
    for encoder in one.clip_encoders:
        assert one.count_tokens(encoder, LONG) == (17, 12, "k l m n o")
        assert two.count_tokens(encoder, LONG) == (17, 22, "")
        longest = " ".join(WORDS + WORDS)
        assert two.count_tokens(encoder, longest)[1:] == (22, " ".join((WORDS + WORDS)[20:]))
        other = f"{CHUNKS[0]} x"
        assert torch.equal(*(one.tokenize(encoder, text) for text in (LONG, other)))
        assert not torch.equal(*(two.tokenize(encoder, text) for text in (LONG, other)))
    assert (
        conditioned(two, LONG)["encoder_hidden_states"].shape[1]
        == {"sd15": 24, "sdxl": 24, "sd3": 34}[name]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_chunks_are_other_entries_of_the_cache_than_whole_ones(settings, tmp_path, name):
    encoders = [
        CachedEncoder(whole(settings(*more, family=name)), tmp_path, True, ())
        for more in ((), (TWO,), ("model.clip_chunks=3",))
    ]
    for part in encoders[0].family.text_encoder_names:
        keys = {encoder.prompt_key(part, "a") for encoder in encoders}
        assert len(keys) == (3 if part in encoders[0].family.clip_encoders else 1)


@pytest.mark.parametrize("text", [(), (TEXT,)], ids=["denoiser", "and text encoders"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_cache_gives_the_same_gradients(settings, name, text):
    overrides = (TWO, f"data.instance_prompt={LONG}", *text)
    cached, live = (
        first_gradients(settings(f"data.cache={keep}", *overrides, family=name))[-1]
        for keep in ("true", "false")
    )
    assert cached
    assert all(torch.equal(cached[key], live[key]) for key in cached)


@pytest.mark.parametrize("name", by_hand_but(["sd3"], FAMILIES))
def test_a_run_trains_samples_and_reloads_with_long_prompts(settings, tmp_path, capsys, name):
    finals = {}
    for chunks in (1, 2):
        finals[chunks] = settings(
            f"model.clip_chunks={chunks}",
            f"data.instance_prompt={LONG}",
            f"validation.prompts=['{LONG}']",
            "train.max_train_steps=2",
            TEXT,
            f"output_dir={tmp_path}/{chunks}",
            family=name,
        )
        run(finals[chunks])
        printed = capsys.readouterr().out
        assert "reload proof" in printed
        assert (f"text_encoder reads {12 if chunks == 1 else 22}" in printed) == (chunks == 1)
    assert losses(finals[1]) != losses(finals[2])
    assert len(read_metrics(finals[2])) == 2
    assert lora(finals[1]).keys() == lora(finals[2]).keys()
    cards = [(final.output_dir / "README.md").read_text() for final in finals.values()]
    assert ["2 chunks of 75 tokens: use a program" in card for card in cards] == [False, True]


def test_more_chunks_are_another_run(settings):
    run(settings("train.max_train_steps=2"))
    with pytest.raises(UserError, match=r"model\.clip_chunks: was 1, is 2"):
        run(settings(TWO))
