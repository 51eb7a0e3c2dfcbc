"""A cache entry may be unused but is never wrong: damage is noticed, and a key tells all that its
entry depends on."""

import gc
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from trainers.data.crops import Crop, Jitter
from trainers.data.encoder_cache import CachedEncoder, TensorCache
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.pictures import Picture
from trainers.errors import RunFailedError, UserError
from trainers.families.sd15 import SD15

ENTRY = {
    "moments": torch.arange(6.0).view(2, 3).T,
    "half": torch.ones(3, dtype=torch.bfloat16),
    "ids": torch.arange(4),
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """`Family.unload` collects garbage; without what the imports left, that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cache(tmp_path):
    cache = TensorCache(tmp_path / "cache")
    cache.write("key", ENTRY)
    return cache


def test_what_is_written_is_read_in_this_process_and_the_next(cache):
    assert same(cache.read("key"), ENTRY)
    assert same(TensorCache(cache.folder).read("key"), ENTRY)


def test_what_was_not_written_is_none(cache):
    assert cache.read("other") is None


def test_an_entry_that_was_looked_for_too_early_is_found_once_written(cache):
    assert cache.read("other") is None
    cache.write("other", ENTRY)
    assert same(cache.read("other"), ENTRY)


def test_no_other_files_are_left(cache):
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [cache.path("key")]


def test_an_entry_cut_at_any_byte_is_none(cache):
    whole = cache.path("key").read_bytes()
    for length in range(len(whole)):
        cache.path("key").write_bytes(whole[:length])
        assert cache.read_file("key") is None, length


@pytest.mark.parametrize("mask", [0x01, 0x0F, 0x80, 0xFF])  # 0x0F turns the type F32 into I32
def test_an_entry_with_any_byte_changed_is_none_or_still_right(cache, mask):
    whole = cache.path("key").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(len(whole)):
        cache.path("key").write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
        found = cache.read_file("key")
        assert found is None or (i < header and same(found, ENTRY)), i


def test_entries_that_were_exchanged_are_none(cache):
    cache.write("other", {**ENTRY, "ids": torch.arange(5)})
    shutil.copy(cache.path("other"), cache.path("key"))
    assert cache.read_file("key") is None
    assert cache.read_file("other")


def test_what_is_no_file_is_no_entry_and_a_folder_in_its_place_is_named(cache):
    path = cache.path("key")
    path.unlink()
    os.mkfifo(path)
    assert cache.read_file("key") is None
    cache.write("key", ENTRY)
    assert same(cache.read_file("key"), ENTRY)
    path.unlink()
    path.mkdir()
    assert cache.read_file("key") is None
    with pytest.raises(UserError, match="is a folder, and a file is to be written there"):
        cache.write("key", ENTRY)


# Keys


class Counted(SD15):
    """The family, noting what it encodes."""

    encoded = 0

    def encode_images(self, pixels):
        self.encoded += len(pixels)
        return super().encode_images(pixels)

    def encode_ids(self, name, ids):
        self.encoded += len(ids)
        return super().encode_ids(name, ids)


@pytest.fixture
def encoder(settings, tmp_path):
    """A function: base folder, precision -> a fresh encoder over one cache folder."""

    def make(base=None, dtype=torch.float32, train=()):
        model = settings(*([f"model.pretrained_model_name_or_path={base}"] if base else [])).model
        return CachedEncoder(Counted(model, dtype=dtype), tmp_path / "cache", True, train)

    return make


def picture(content):
    return Picture("name", partial(bytes, content), "")


def both(encoder):
    return {
        "image": encoder.image_key(picture(b"a"), Crop(16, 16)),
        "prompt": encoder.prompt_key("text_encoder", "a"),
    }


CHANGES = [{}, {"width": 24}, {"height": 24}, {"left": 0}, {"top": 0}, {"flip": True}]
CHANGES += [{"jitter": Jitter(**{name: 0.9})} for name in ("share", "left", "saturation")]


def test_a_pictures_key_depends_on_its_bytes_and_its_view(encoder):
    key, plain = encoder().image_key, Crop(16, 16)
    crops = [replace(plain, **change) for change in CHANGES]
    keys = {key(picture(content), crop) for content in (b"a", b"b") for crop in crops}
    assert len(keys) == 18
    assert key(Picture("renamed", partial(bytes, b"a"), "other caption"), plain) == key(
        picture(b"a"), plain
    )


def test_a_prompts_key_depends_on_the_prompt(encoder):
    one, other = encoder(), encoder()
    keys = [
        encoder.prompt_key("text_encoder", words)
        for encoder, words in ((one, "a"), (other, "a"), (other, "b"))
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("part", "depends"),
    [
        ("vae", {"image"}),
        ("text_encoder", {"prompt"}),
        ("tokenizer", {"prompt"}),
        ("unet", set()),
        ("scheduler", set()),
    ],
)
def test_a_key_changes_with_the_content_of_the_encoders_that_it_depends_on(
    encoder, base, tmp_path, part, depends
):
    copy = shutil.copytree(base, tmp_path / "copy")

    def keys():
        fresh = encoder(copy)
        return both(fresh)

    before = keys()
    assert before == both(encoder())
    file = max((copy / part).iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == depends


def test_a_prompts_key_depends_on_the_precision_and_a_pictures_does_not(encoder):
    """The autoencoder always runs in float32."""
    full, half = encoder(), encoder(dtype=torch.bfloat16)
    assert both(full)["prompt"] != both(half)["prompt"]
    assert both(full)["image"] == both(half)["image"]


# Filling

VIEWS = [Crop(16, 16), Crop(16, 16, flip=True)]


@pytest.fixture
def filled(encoder, settings):
    """An encoder after its fill, the pictures, and a function that fills (another) encoder."""
    pictures = load_instance_pictures(settings().data)

    def fill(encoder):
        jobs = [(picture, crop) for picture in pictures for crop in VIEWS]
        encoder.fill(jobs, ["a b c", ""], Accelerator(cpu=True))
        return encoder

    return fill(encoder()), pictures, fill


def test_entries_equal_what_diffusers_encodes(filled, base):
    encoder, pictures, _ = filled
    pipe = StableDiffusionPipeline.from_pretrained(base)
    for picture in pictures:
        for crop in VIEWS:
            posterior = pipe.vae.encode(crop(picture.decode())[None]).latent_dist
            assert torch.equal(encoder.moments(picture, crop), posterior.parameters[0])
    for prompt in ("a b c", ""):
        theirs = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]
        torch.testing.assert_close(encoder.text_inputs(prompt)["text_encoder"], theirs)


def test_each_picture_view_and_prompt_is_encoded_once_and_never_again(filled, encoder):
    first, pictures, fill = filled
    assert first.family.encoded == len(pictures) * len(VIEWS) + 2
    assert fill(encoder()).family.encoded == 0


def test_the_encoders_are_freed(filled):
    assert filled[0].family.pipe is None


def test_a_damaged_entry_stops_the_run_and_the_next_fill_makes_it_again(filled, encoder):
    first, pictures, fill = filled
    good = first.moments(pictures[1], VIEWS[0]).clone()  # what is read is the file, mapped
    path = first.cache.path(first.image_key(pictures[1], VIEWS[0]))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFailedError, match=pictures[1].name):
        encoder().moments(pictures[1], VIEWS[0])
    again = fill(encoder())
    assert again.family.encoded == 1
    assert torch.equal(again.moments(pictures[1], VIEWS[0]), good)


def test_a_trained_text_encoder_is_fed_token_ids_that_are_never_cached(filled, encoder):
    fill = filled[2]
    trained = fill(encoder(train=("text_encoder",)))
    assert trained.family.encoded == 0
    trained.family.load("text_encoder")
    ids = trained.text_inputs("a b c")["text_encoder_ids"]
    assert torch.equal(
        ids,
        trained.family.pipe.tokenizer("a b c", padding="max_length", return_tensors="pt").input_ids[
            0
        ],
    )
