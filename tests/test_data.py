"""Pictures decode as viewers show them; captions have one precedence; order depends on (seed, step,
row) alone."""

import json
from collections import Counter
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from trainers.config import DataConfig
from trainers.data.crops import Crop, choose_crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.pictures import Picture, load_class_pictures, load_instance_pictures
from trainers.data.rng import permutation
from trainers.data.sampler import BatchSlice
from trainers.errors import UserError

GREY = np.add.outer(np.arange(0, 128, 16), np.arange(0, 128, 16)).astype(np.uint8)  # (8, 8)


def data(folder=None, **keys):
    return DataConfig(**{"instance_data_dir": folder, "instance_prompt": "prompt", **keys})


@pytest.fixture
def put(tmp_path):
    """A function that saves a small picture (or writes given bytes) as a name, and returns the
    path."""

    def save(name, content=None, **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (content or Image.fromarray(GREY).convert("RGB")).save(path, **options)
        return path

    return save


def decoded(path):
    return Picture(path.name, path.read_bytes, "").decode()


# Decoding


def test_pictures_of_every_format_are_read_in_the_order_of_their_names(put, tmp_path):
    names = ["a.png", "b.bmp", "c.webp", "d.jpg", "e.JPEG"]
    for name in reversed(names):
        put(name)
    put(".hidden.png")
    put("f.psd", b"a format that is not read")
    put("notes.md", b"not a picture")
    assert [p.name for p in load_instance_pictures(data(tmp_path))] == [
        str(tmp_path / name) for name in names
    ]


STORED_AS = {  # orientation tag -> how an upright picture is stored under it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("tag", STORED_AS)
def test_a_turned_picture_is_upright(put, tag):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 3, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = tag
    stored = upright if STORED_AS[tag] is None else upright.transpose(STORED_AS[tag])
    assert np.array_equal(decoded(put("turned.png", stored, exif=exif)), upright)


def test_what_is_transparent_is_white(put):
    color, alpha = np.random.default_rng(0).integers(0, 255, (2, 8, 8), dtype=np.uint8)
    rgba = np.dstack([color, color // 2, 255 - color, alpha])
    share = alpha[..., None] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    assert np.abs(decoded(put("clear.png", Image.fromarray(rgba, "RGBA"))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_transparent_shade_or_palette_entry_is_white(put, mode):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="L")
    if mode == "P":
        image = image.convert("P")
        image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2])
    shades = np.asarray(decoded(put("clear.png", image, transparency=1)))
    assert shades.tolist() == [[[0] * 3, [255] * 3, [2] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_shows_the_same_grey(put, mode):
    gray = GREY // 128 * 255 if mode == "1" else GREY
    image = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert(mode)
    )
    path = put("grey.jpg", image, quality=100) if mode == "CMYK" else put("grey.png", image)
    with Image.open(path) as stored:
        assert stored.mode == mode
    picture = decoded(path)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, int) - gray[..., None]).max() <= (4 if mode == "CMYK" else 0)


BROKEN = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"<html>not found</html>",
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut at the start": lambda whole: whole[:20],
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
def test_a_broken_picture_is_named(put, tmp_path, name, damage):
    put("whole.png")
    put(name, damage(put(name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} is not a readable picture"):
        load_instance_pictures(data(tmp_path))
    with pytest.warns(UserWarning, match=f"skipped: .*{name}"):
        (left,) = load_instance_pictures(data(tmp_path, skip_corrupt=True))
    assert left.name.endswith("whole.png")


def test_a_malformed_exif_tag_neither_crashes_nor_turns_the_picture_wrong(put):
    exif = Image.Exif()
    exif[0x112], exif[0x131] = 6, "camera"
    text_as_resolution = exif.tobytes().replace(b"\x01\x31\x00\x02", b"\x01\x1a\x00\x02")
    path = put("camera.jpg", Image.new("RGB", (4, 2)), exif=text_as_resolution)
    with suppress(UserError):
        assert decoded(path).size == (2, 4)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("names", [[], ["broken.png"]], ids=["empty", "all skipped"])
def test_a_folder_without_pictures_is_named(put, tmp_path, names):
    for name in names:
        put(name, b"")
    with pytest.raises(UserError, match=f"{tmp_path} holds no pictures"):
        load_instance_pictures(data(tmp_path, skip_corrupt=True))


def test_class_pictures_are_as_many_as_wanted_and_have_the_class_prompt(photos):
    pictures = load_class_pictures(photos, data(class_prompt="a dog", num_class_images=3))
    assert [(p.name, p.caption) for p in pictures] == [
        (str(photos / f"{i}.png"), "a dog") for i in range(3)
    ]


def test_a_class_picture_keeps_its_own_caption(put):
    put("0.png"), put("1.png"), put("1.txt", b"a red dog")
    pictures = load_class_pictures(
        put("2.png").parent, data(class_prompt=["a dog", "a cat"], num_class_images=9)
    )
    assert [p.caption for p in pictures] == ["a dog", "a red dog", "a dog"]


# Captions


def test_a_caption_is_its_text_file_else_its_metadata_line_else_the_prompt(put, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        put(name)
    put("a.txt", "  from é the file \n".encode())
    lines = [
        {"file_name": name, "text": "from metadata", "other": "from column"}
        for name in ("a.png", "b.png")
    ]
    put("metadata.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    captions = [p.caption for p in load_instance_pictures(data(tmp_path))]
    assert captions == ["from é the file", "from metadata", "prompt"]
    captions = [p.caption for p in load_instance_pictures(data(tmp_path, caption_column="other"))]
    assert captions == ["from é the file", "from column", "prompt"]


def test_pictures_without_any_caption_are_named(put, tmp_path):
    put("with.png")
    put("with.txt", b"a caption")
    put("without.png")
    with pytest.raises(UserError, match=r"no caption for without.png: set data.instance_prompt"):
        load_instance_pictures(data(tmp_path, instance_prompt=None))


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png", "text"',
        '{"text": "no file name"}',
        '["a.png"]',
        '{"file_name": "a.png", "text": 3}',
    ],
)
def test_a_wrong_metadata_line_is_the_users_mistake(put, tmp_path, line):
    put("a.png")
    put("metadata.jsonl", line.encode())
    with pytest.raises(UserError, match=r"metadata.jsonl"):
        load_instance_pictures(data(tmp_path))


def test_a_caption_column_that_metadata_lacks_is_told(put, tmp_path):
    put("a.png")
    put("metadata.jsonl", b'{"file_name": "a.png", "text": "a caption"}')
    with pytest.raises(UserError, match=r"data.caption_column.*text"):
        load_instance_pictures(data(tmp_path, caption_column="txt"))


def test_a_caption_file_is_utf_8_with_or_without_a_mark(put, tmp_path):
    put("a.png")
    put("a.txt", "a dog".encode("utf-8-sig"))
    assert [p.caption for p in load_instance_pictures(data(tmp_path))] == ["a dog"]
    put("a.txt", "café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt"):
        load_instance_pictures(data(tmp_path))


# The `datasets` library


@pytest.fixture
def parquet(photos, tmp_path, monkeypatch):
    """A function: captions -> a parquet file of as many photos; None among the pictures where
    asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(captions, absent=()):
        features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
        images = [
            {"bytes": (photos / f"{i}.png").read_bytes(), "path": None}
            for i in range(len(captions))
        ]
        rows = {
            "image": [None if i in absent else image for i, image in enumerate(images)],
            "words": captions,
        }
        path = tmp_path / "set.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(path)
        return data(dataset_name=str(path), caption_column="words")

    return write


def test_a_parquet_set_gives_the_same_pictures_as_the_folder(parquet, photos):
    captions = [f"photo {i}" for i in range(5)]
    ours, folder = load_instance_pictures(parquet(captions)), load_instance_pictures(data(photos))
    assert [(p.digest, p.caption) for p in ours] == [
        (p.digest, c) for p, c in zip(folder, captions, strict=True)
    ]
    assert all(np.array_equal(a.decode(), b.decode()) for a, b in zip(ours, folder, strict=True))


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_a_missing_column_lists_those_that_exist(parquet, key):
    wrong = parquet(["a"]).model_copy(update={key: "picture"})
    with pytest.raises(
        UserError, match=rf"data.{key}: .* no column 'picture', it has image, words"
    ):
        load_instance_pictures(wrong)


def test_a_data_set_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.dataset_name: cannot load '.*absent.parquet'"):
        load_instance_pictures(data(dataset_name=str(tmp_path / "absent.parquet")))


def test_a_row_without_caption_takes_the_prompt_or_is_told(parquet):
    settings = parquet(["one", None])
    assert [p.caption for p in load_instance_pictures(settings)] == ["one", "prompt"]
    with pytest.raises(UserError, match="no caption"):
        load_instance_pictures(settings.model_copy(update={"instance_prompt": None}))


def test_a_row_without_picture_is_named_or_skipped(parquet):
    settings = parquet(["one", "two"], absent=[1])
    with pytest.raises(UserError, match=r"set.parquet\[1\]"):
        load_instance_pictures(settings)
    with pytest.warns(UserWarning, match="skipped"):
        assert [
            p.caption
            for p in load_instance_pictures(settings.model_copy(update={"skip_corrupt": True}))
        ] == ["one"]


# Views


def test_the_centre_view_equals_diffusers_preprocessing(photos):
    for path in photos.iterdir():
        image = decoded(path).resize((48, 32))
        theirs = VaeImageProcessor().preprocess(image, 16, 16, resize_mode="crop")[0]
        torch.testing.assert_close(Crop(16)(image), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (24, 24), (200, 24), (7, 9)])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (0.5, 0.5), (1, 1), (0.3, 0.9)])
def test_any_view_is_a_square_inside_the_resized_picture(size, left, top):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )
    pixels = Crop(24, left, top)(image)
    assert pixels.shape == (3, 24, 24)
    assert -1 <= pixels.min() < pixels.max() <= 1
    if min(size) == 24:  # nothing to resize: the view is a cut
        x, y = round(left * (size[0] - 24)), round(top * (size[1] - 24))
        cut = np.asarray(image)[y : y + 24, x : x + 24]
        assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0), cut)


def test_black_and_white_are_the_ends_of_the_range():
    pixels = Crop(2)(Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB"))
    assert pixels.tolist() == [[[-1, 1], [1, -1]]] * 3


def test_a_flip_mirrors_the_same_cut(photos):
    image = decoded(photos / "0.png")
    torch.testing.assert_close(
        Crop(16, 0.2, 0.7, flip=True)(image), Crop(16, 0.2, 0.7)(image).flip(2)
    )


def test_a_variant_depends_on_content_and_number_only():
    free, many = data(center_crop=False, random_flip=True), [fake(i) for i in range(400)]
    renamed = Picture("other name", many[0].read, "other caption")
    assert (
        choose_crop(renamed, 0, free)
        == choose_crop(many[0], 0, free)
        != choose_crop(many[0], 1, free)
    )
    crops = [choose_crop(p, 0, free) for p in many]
    assert len({(v.left, v.top) for v in crops}) == 400
    assert 0.4 < sum(v.flip for v in crops) / 400 < 0.6
    assert {choose_crop(p, 0, data()) for p in many} == {Crop(512)}


# Order and batches


def fake(i, caption="caption"):
    return Picture(f"{i}", partial(str.encode, f"{i}"), caption)


class Fake:
    """Stands for the encoders: moments tell the picture and its view, conditions tell the
    prompt."""

    def moments(self, picture, crop):
        return torch.tensor(
            [int(picture.digest[:12], 16), crop.left, crop.top, crop.flip], dtype=torch.float64
        )

    def text_inputs(self, prompt):
        return {"text": torch.tensor([len(prompt)])}


POOLS = [[fake(i, "i" * (i + 1)) for i in range(5)], [fake(i, "c" * i) for i in range(10, 17)]]
VARIED = data(center_crop=False, random_flip=True, caption_dropout=0.3, prior_loss_weight=0.5)


def batches(size=2, accumulation=1, rank=0, world=1, settings=VARIED, pools=POOLS, seed=0):
    return DreamBoothBatches(
        pools, Fake(), settings, BatchSlice(seed, size, accumulation, rank, world)
    )


def samples(source, step):
    """[(row, moments, prompt length, weight)] of a step, each weight as a share of the step's
    loss."""
    found, micros = [], source.batch_slice.accumulation_steps * source.batch_slice.world_size
    for batch, rng in source(step):
        parts = batch["moments"], batch["text"]["text"], batch["weight"] / micros
        found += zip(rng.rows, *(part.tolist() for part in parts), strict=True)
    return found


def test_a_permutation_depends_on_its_seed_only():
    orders = [permutation(seed, 20) for seed in range(4)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    permutation.cache_clear()
    assert permutation(0, 20) == orders[0]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_every_picture_is_visited_once_in_each_epoch(size):
    source, fixed = (
        batches(size, settings=data(), pools=POOLS[:1]),
        [int(p.digest[:12], 16) for p in POOLS[0]],
    )
    visits = [moments[0] for step in range(10) for _, moments, _, _ in samples(source, step)]
    epochs = [visits[i : i + 5] for i in range(0, len(visits) - 4, 5)]
    assert all(sorted(epoch) == sorted(fixed) for epoch in epochs)


@pytest.mark.parametrize("pools", [POOLS[:1], POOLS], ids=["instance", "prior"])
@pytest.mark.parametrize(
    ("size", "accumulation", "world"), [(2, 2, 2), (2, 1, 4), (4, 1, 2), (8, 1, 1), (1, 8, 1)]
)
def test_a_global_batch_does_not_depend_on_how_it_is_shared(pools, size, accumulation, world):
    for step in (0, 7):
        whole = samples(batches(2, 4, pools=pools), step)
        ranks = [batches(size, accumulation, rank, world, pools=pools) for rank in range(world)]
        shared = [sample for rank in ranks for sample in samples(rank, step)]
        assert sorted(map(str, shared)) == sorted(map(str, whole))
        assert sorted(row for row, *_ in whole) == list(range(8 * len(pools)))


def test_a_step_does_not_depend_on_the_steps_before():
    walked = batches()
    history = [samples(walked, step) for step in range(20)]
    permutation.cache_clear()
    assert samples(batches(), 19) == history[19]
    assert samples(batches(seed=1), 19) != history[19] != history[18]


@pytest.mark.parametrize(
    ("pools", "total"), [(POOLS[:1], 1), (POOLS, 1.5)], ids=["instance", "prior"]
)
def test_weights_sum_to_one_and_the_prior_weight(pools, total):
    for batch, _ in batches(3, 2, pools=pools)(0):
        assert batch["weight"].sum().item() == pytest.approx(total)
        assert batch["weight"][:3].sum().item() == pytest.approx(1)


def test_captions_belong_to_their_pictures_and_the_asked_share_is_dropped():
    written = {int(p.digest[:12], 16): len(p.caption) for pool in POOLS for p in pool}
    seen = [
        (written[m[0]], text[0])
        for step in range(250)
        for _, m, text, _ in samples(batches(4), step)
    ]
    assert all(length in (0, caption) for caption, length in seen)
    counts = Counter(length == 0 for _, length in seen)
    assert (
        abs(counts[True] / len(seen) - 0.3) < 4 * (0.3 * 0.7 / len(seen)) ** 0.5
    )  # four standard errors


def test_all_variants_are_visited_and_no_more():
    settings = data(center_crop=False, cache_variants=3)
    seen = {
        tuple(m)
        for step in range(100)
        for _, m, _, _ in samples(batches(settings=settings, pools=POOLS[:1]), step)
    }
    assert len(seen) == 5 * 3
