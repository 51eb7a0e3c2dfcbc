"""What decides the result of a run is compared when it is resumed, and a refusal names it."""

import shutil

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from trainers.config import DreamBoothConfig, GanConfig
from trainers.config.base_sections import OptimizerConfig
from trainers.distributed.accelerator import record_precision
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images
from trainers.run import run
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint
from trainers.training.facts import check_facts, config_facts, resume_facts
from trainers.training.picture_facts import MAX_LISTED_FILES, describe_pictures

PRIOR = ("data.class_prompt=c", "data.num_class_images=2")


def pool(*captions, names="abcdefghijkl", contents="abcdefghijkl", folder="/photos"):
    rows = zip(names, contents, captions, strict=False)
    return describe_pictures([(f"{folder}/{n}.png", c * 64, text) for n, c, text in rows])


@pytest.fixture
def compare(tmp_path):
    """A function: facts at the checkpoint and now, config -> the lines of the refusal, if any."""

    def call(saved, current, config=None):
        config = record_precision(config or DreamBoothConfig(), Accelerator(cpu=True))
        now = resume_facts(config, Accelerator(cpu=True), current)
        try:
            check_facts(tmp_path / "step-000002", now | saved, now, config)
        except UserError as error:
            head, *lines, advice = str(error).splitlines()
            assert "step-000002 was made by another configuration, or from other files:" in head
            assert "another output_dir" in advice
            return [line.strip() for line in lines]
        return []

    return call


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (pool("x", "y"), pool("x", "y"), None),
        (pool("x", "y"), pool("x", "y", folder="/moved"), None),
        (pool("x", "y"), pool("x", "y", names="mn"), None),
        (pool("x", "y"), pool("x", "y", "z"), "added c.png"),
        (pool("x", "y", "z"), pool("x", "y"), "removed c.png"),
        (pool("x", "y"), pool("x", "y", contents="az"), "changed b.png"),
        (pool("x", "y"), pool("x", "z"), "with another caption or label b.png"),
        (pool("x", "y"), pool("x", "z", "z", contents="mbc"), "added c.png; changed a.png; with"),
        (pool("x", "x"), pool("x", "x", contents="ba"), "changed a.png, b.png"),
        (pool(*"x" * 8), pool("x"), "removed b.png, c.png, d.png, e.png, f.png and 2 more"),
        (pool("x"), {}, "1 before, 0 now"),
    ],
)
def test_changed_pictures_are_named(compare, before, now, words):
    lines = compare({"pictures": {"instance": before}}, {"pictures": {"instance": now}})
    if words is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"instance pictures: {words}")


def test_of_many_pictures_one_digest_is_kept_and_their_order_counts(compare):
    rows = [(f"set[{i}]", str(i), "") for i in range(MAX_LISTED_FILES + 1)]
    before, now = describe_pictures(rows), describe_pictures(rows[::-1])
    assert "files" not in before
    (line,) = compare({"pictures": {"training": before}}, {"pictures": {"training": now}})
    assert f"{len(rows)} before, {len(rows)} now" in line


def test_pools_that_come_and_go_are_changes(compare):
    both = {"instance": pool("x"), "class": pool("c")}
    assert compare({"pictures": {"instance": pool("x")}}, {"pictures": both})
    assert compare({"pictures": both}, {"pictures": {"instance": pool("x")}})


def test_each_difference_is_told_at_once(compare):
    saved = {
        "base": {"unet": "1", "vae": "2", "scheduler": "3"},
        "mixed precision": "bf16",
        "global batch": 4,
        "pictures": {"instance": pool("x")},
    }
    current = {"base": {"unet": "9", "vae": "2", "scheduler": "0"}, "pictures": {"instance": {}}}
    assert compare(saved, current) == [
        "instance pictures: 1 before, 0 now; contents, captions, labels or their order are not "
        "the same",
        "base model: other files of unet, scheduler",
        "mixed precision: was bf16, is no",
        "global batch: was 4, is 1",
    ]


def test_keys_are_told_by_their_values_and_new_ones_had_their_defaults(compare):
    config = DreamBoothConfig(optimizer=OptimizerConfig(learning_rate=0.5))
    facts = resume_facts(config, Accelerator(cpu=True), {})["config"]
    older = {key: value for key, value in facts.items() if key != "lora.use_dora"}
    older |= {"optimizer.learning_rate": 0.25, "train.cuda_graphs": True, "lora.kohya": True}
    assert compare({"config": older}, {}, config) == [
        "optimizer.learning_rate: was 0.25, is 0.5",
        "lora.kohya: was true, is null",
    ]
    dora = config.model_copy(update={"lora": config.lora.model_copy(update={"use_dora": True})})
    assert compare({"config": facts}, {}, dora) == ["lora.use_dora: was false, is true"]


def test_a_section_that_comes_or_goes_is_one_line(compare):
    plain, whole = DreamBoothConfig(), DreamBoothConfig(lora=None)
    facts = [resume_facts(c, Accelerator(cpu=True), {})["config"] for c in (plain, whole)]
    assert compare({"config": facts[0]}, {}, whole) == ["lora: is null"]
    assert compare({"config": facts[1]}, {}, plain) == ["lora: was null"]


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(tmp_path):
    config = DreamBoothConfig()
    inputs = {"pictures": {"instance": pool("x")}, "base": {"unet": "1"}}
    now = resume_facts(config, Accelerator(cpu=True), inputs)
    old = {"data": "e3b0", "global batch": 1, **now["config"]}
    with pytest.warns(UserWarning, match="which pictures, base, mixed precision it was made with"):
        check_facts(tmp_path, old, now, config)
    with (
        pytest.warns(UserWarning, match="earlier version"),
        pytest.raises(UserError, match="seed: was 1, is 0"),
    ):
        check_facts(tmp_path, old | {"seed": 1}, now, config)


def test_labels_count_where_the_pictures_are_the_same(bars, tmp_path):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(bars / "train.parquet"), split="train")
    swapped = rows.map(lambda row: {"label": 1 - row["label"]})
    (tmp_path / "swapped").mkdir()
    swapped.to_parquet(tmp_path / "swapped" / "train.parquet")
    described = []
    for folder in (bars, tmp_path / "swapped"):
        data = {"dataset_name": str(folder), "label_column": "label", "resolution": 16}
        data["test_split"] = None
        config = GanConfig(data=GanConfig().data.model_copy(update=data))
        described.append(load_images(config.data, "cpu").describe())
    assert described[0]["digest"] != described[1]["digest"]
    assert [files[0] for files in described[0]["files"].values()] == [
        files[0] for files in described[1]["files"].values()
    ]


@pytest.fixture
def started(settings, base, photos, tmp_path):
    """The overrides of a run that has two steps, with a base and photos of its own."""
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(photos, tmp_path / "photos")
    overrides = (
        *PRIOR,
        f"model.pretrained_model_name_or_path={tmp_path}/base",
        f"data.instance_data_dir={tmp_path}/photos",
        "data.cache=false",
    )
    run(settings(*overrides, "train.max_train_steps=2"))
    return overrides


def change_weights(tmp_path):
    path = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, path, {"format": "pt"})


def test_a_run_whose_inputs_changed_is_refused_and_one_that_moved_goes_on(
    settings, started, tmp_path, monkeypatch
):
    def resume(*overrides):
        AcceleratorState._reset_state(reset_partial_state=True)
        run(settings(*started, "train.max_train_steps=3", *overrides))

    def refusal(*overrides):
        with pytest.raises(UserError) as error:
            resume(*overrides)
        return str(error.value).splitlines()[1:-1]

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert refusal() == ["  mixed precision: was no, is bf16"]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    picture = tmp_path / "run/class_images/class-00001.png"
    kept = picture.read_bytes()
    Image.new("RGB", (16, 16), "red").save(picture)
    assert refusal() == ["  class pictures: changed class-00001.png"]
    picture.write_bytes(kept)
    (tmp_path / "photos/2.txt").write_text("another caption")
    photo = (tmp_path / "photos/4.png").rename(tmp_path / "photo.png")
    changes = "removed 4.png; with another caption or label 2.png"
    assert refusal() == [f"  instance pictures: {changes}"]
    photo.rename(tmp_path / "photos/4.png")
    (tmp_path / "photos/2.txt").unlink()
    assert not list_checkpoints(tmp_path / "run/checkpoints")[1:]
    # where the files lie does not count
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    resume(f"model.pretrained_model_name_or_path={moved}")
    assert list_checkpoints(tmp_path / "run/checkpoints")[0].name == "step-000003"
    moved.rename(tmp_path / "base")
    change_weights(tmp_path)
    # and the base draws other class pictures
    assert refusal()[-1] == "  base model: other files of unet"


def test_a_run_cannot_end_before_what_was_trained(settings, tmp_path):
    run(settings("train.max_train_steps=3"))
    card = (tmp_path / "run/README.md").read_text()
    message = r"max_train_steps is 2, but .*step-000003 has 3 steps already. Set at least 3"
    with pytest.raises(UserError, match=message):
        run(settings("train.max_train_steps=2"))
    assert (tmp_path / "run/README.md").read_text() == card
    # an earlier checkpoint is one way out
    earlier = tmp_path / "run/checkpoints/step-000002"
    run(settings("train.max_train_steps=2", f"checkpoint.resume_from_checkpoint={earlier}"))
    assert [path.name for path in list_checkpoints(earlier.parent)] == ["step-000002"]
    assert read_checkpoint(earlier.parent / "left-000003")


def test_a_list_of_areas_counts_however_it_is_written():
    def facts(resolution):
        config = DreamBoothConfig(data={"resolution": resolution})
        return config_facts(config)["data.resolution"]

    assert facts([64, 32, 32]) == facts([32, 64]) == [32, 64]
    assert facts([32]) == facts(32) == 32


@pytest.mark.parametrize(
    ("early_stop", "refused"), [({"metric": "subject"}, True), ({}, False), (None, False)]
)
def test_how_pictures_are_drawn_cannot_change_where_they_end_the_run(early_stop, refused):
    """By default the held-out loss comes first, which depends on no drawing."""

    def facts(steps):
        drawn = {"likeness_pictures": 2, "num_inference_steps": steps, "validation_steps": 10}
        data = {"instance_data_dir": "/", "held_out_dir": "/", "instance_prompt": "a"}
        sections = {"data": data, "validation": drawn, "train": {"early_stop": early_stop}}
        return config_facts(DreamBoothConfig(**sections))

    assert (facts(3) != facts(4)) == refused
