"""A run of two concepts: it goes on as it would have, and all that it writes names both."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from PIL import Image

from tests.shared.by_hand import by_hand_but
from tests.shared.families import FLOWS
from tests.shared.feature_networks import MEAN_COLOUR
from tests.shared.runs import assert_close, assert_same, run_steps
from trainers.config import loading
from trainers.data.intake import INTAKE_NAME
from trainers.errors import UserError
from trainers.evaluate import (
    EvaluationOptions,
    card_metrics,
    evaluate,
    format_evaluation,
    of_concept,
)
from trainers.publishing.public import public_text
from trainers.publishing.report import write_report
from trainers.run import run
from trainers.run_folder import CHECKPOINTS, list_checkpoints
from trainers.training.facts import resume_facts
from trainers.training.manifest import read_manifest

PRIVATE = "private-place"


@pytest.fixture
def concepts(tmp_path):
    """A function: keys of both concepts -> the override that gives a run its two concepts."""
    random = np.random.default_rng(0)
    # of two shapes, so that each concept has a bucket of its own
    for name, count, shape in (("rex", 3, (16, 20)), ("tom", 2, (36, 12))):
        folder, masks = (tmp_path / PRIVATE / part for part in (name, f"{name}_masks"))
        folder.mkdir(parents=True), masks.mkdir()
        for i in range(count):
            array = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(array).save(folder / f"{i}.png")
            Image.fromarray(array[..., 0]).save(masks / f"{i}.png")

    def make(rex=None, tom=None):
        first = {"name": "rex", "instance_data_dir": tmp_path / PRIVATE / "rex"}
        first |= {"instance_prompt": "a b c", "class_prompt": "c", "num_class_images": 2}
        second = {"name": "tom", "instance_data_dir": tmp_path / PRIVATE / "tom"}
        second |= {"instance_prompt": "d e f", "class_prompt": "f", "num_class_images": 3}
        listed = [first | (rex or {}), second | {"repeats": 2} | (tom or {})]
        listed = [{key: str(value) for key, value in concept.items()} for concept in listed]
        for concept in listed:
            for key in ("num_class_images", "repeats"):
                if key in concept:
                    concept[key] = int(concept[key])
        nothing = ("data.instance_data_dir=null", "data.instance_prompt=null")
        return (*nothing, f"data.concepts={json.dumps(listed)}")

    return make


VARIED = ("data.random_flip=true", "optimizer.lr_scheduler=constant")


@pytest.mark.parametrize("family", by_hand_but(["flux"], ["sd15", *FLOWS]))
def test_three_steps_and_three_more_equal_six(settings, concepts, tmp_path, family):
    """With buckets, masks and class pictures."""
    masked = concepts(rex={"mask_dir": tmp_path / PRIVATE / "rex_masks"})
    shared = (*VARIED, *masked, f"data.cache_dir={tmp_path}/cache")
    whole = settings(*shared, f"output_dir={tmp_path}/whole", family=family)
    parts = settings(*shared, f"output_dir={tmp_path}/parts", family=family)
    run(whole)
    run_steps(parts, 3)
    run(parts)
    assert_same(whole, parts)


@pytest.mark.parametrize("family", by_hand_but(["sd15"], ["sd15", *FLOWS]))
def test_one_batch_of_four_equals_two_of_two_and_four_of_one(settings, concepts, tmp_path, family):
    """With buckets, masks and class pictures."""
    rex = {"mask_dir": tmp_path / PRIVATE / "rex_masks", "class_data_dir": tmp_path / "class/rex"}
    both = concepts(rex, {"class_data_dir": tmp_path / "class/tom"})
    shared = (*VARIED, *both, f"data.cache_dir={tmp_path}/cache")
    runs = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        batch = (f"train.train_batch_size={size}", f"train.gradient_accumulation_steps={parts}")
        folder = f"output_dir={tmp_path}/{size}"
        runs.append(settings(*shared, *batch, "train.max_train_steps=4", folder, family=family))
        run(runs[-1])
    assert_close(*runs[:2])
    assert_close(runs[0], runs[2])


def test_all_that_a_run_writes_names_both_concepts_and_no_place(settings, concepts, capsys):
    config = settings(*concepts(), "train.max_train_steps=1", "validation.prompts=[a b c]")
    run(config)
    folder, printed = config.output_dir, capsys.readouterr().out
    assert "  rex         3 of rex, 43% of what is learnt\n" in printed
    assert "captions: 2 times 'd e f'" in printed
    assert "  class       5 pictures of 2 prompts" in printed
    notes = [note["text"] for note in json.loads((folder / INTAKE_NAME).read_text())]
    assert "rex: 3 pictures in rex, captions: 3 by prompt" in notes
    for name, count in (("rex", 2), ("tom", 3)):
        assert len(list((folder / "class_images" / name).glob("*.png"))) == count
    card = (folder / "README.md").read_text()
    assert "| Concept rex | prompted by 'a b c'; 3 pictures, 43% of what was learnt |" in card
    assert "| Concept tom | prompted by 'd e f'; 2 pictures, 57% of what was learnt |" in card
    assert "5 of 'c', 'f'" in card
    public = public_text(config)
    for text in (card, public, write_report(folder, pictures=False).read_text()):
        assert PRIVATE not in text
    assert "INSTANCE_DATA_DIR" in public
    report = write_report(folder).read_text()
    assert "rex: 0.png" in report
    assert "“a b c”, “d e f”" in report


def test_what_is_written_loads_again_to_the_same_concepts(settings, concepts, tmp_path):
    config = settings(*concepts())
    text = loading.dump_config(config)
    assert [c["name"] for c in yaml.safe_load(text)["data"]["concepts"]] == ["rex", "tom"]
    (tmp_path / "again.yaml").write_text(text)
    assert loading.load_config(tmp_path / "again.yaml") == config


def test_a_changed_picture_or_key_of_a_concept_refuses_to_go_on(settings, concepts, tmp_path):
    run(settings(*concepts(), "train.max_train_steps=2"))
    with pytest.raises(UserError) as caught:
        run(settings(*concepts(tom={"repeats": 3, "class_prompt": "g"})))
    told = str(caught.value)
    assert "tom: instance pictures: with another caption or label 0.png, 1.png" in told
    assert "data.concepts[tom].repeats: was 2, is 3" in told
    assert "data.concepts[tom].class_prompt: was f, is g" in told
    assert "rex: instance" not in told
    Image.new("RGB", (16, 16), "red").save(tmp_path / PRIVATE / "rex/1.png")
    with pytest.raises(UserError, match=r"rex: instance pictures: changed 1\.png"):
        run(settings(*concepts()))


def test_the_folders_of_concepts_may_move(settings, concepts, tmp_path):
    accelerator = Accelerator(cpu=True)
    before = resume_facts(settings(*concepts()), accelerator, {})
    assert before != resume_facts(settings(*concepts(rex={"repeats": 2})), accelerator, {})
    moved = (tmp_path / PRIVATE / "tom").rename(tmp_path / "elsewhere")
    after = settings(*concepts(tom={"instance_data_dir": moved}))
    assert resume_facts(after, accelerator, {}) == before


def test_the_order_of_concepts_is_a_fact(settings, concepts):
    """Their pictures are drawn in it."""
    nothing, listed = concepts()[:2], json.loads(concepts()[2].partition("=")[2])
    run(settings(*concepts(), "train.max_train_steps=2"))
    with pytest.raises(
        UserError, match=r'data\.concepts: was \["rex", "tom"\], is \["tom", "rex"\]'
    ):
        run(settings(*nothing, f"data.concepts={json.dumps(listed[::-1])}"))


def test_masks_may_be_named_from_here_and_from_the_root(settings, concepts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masked = {"rex": {"mask_dir": f"{PRIVATE}/rex_masks"}}
    masked["tom"] = {"mask_dir": tmp_path / PRIVATE / "tom_masks"}
    config = settings(*concepts(**masked), "train.max_train_steps=1")
    run(config)
    (folder,) = list_checkpoints(config.output_dir / CHECKPOINTS)
    described = read_manifest(folder)["facts"]["pictures"]["mask"]["files"]
    names = [f"rex_masks/{i}.png" for i in range(3)] + [f"tom_masks/{i}.png" for i in range(2)]
    assert [*described] == names


def test_an_evaluation_is_of_one_concept_and_says_so(settings, concepts):
    config = settings(*concepts(), "train.max_train_steps=1")
    run(config)
    options = EvaluationOptions(strengths=(1.0,), num_images=1)
    results = {}
    for name in (None, "tom"):
        chosen = replace(options, concept=name)
        results[name] = evaluate(config, config.output_dir, [MEAN_COLOUR], chosen)
    assert results[None]["concept"] == "rex alone is measured; --concept measures tom"
    assert results["tom"]["concept"] == "tom alone is measured; --concept measures rex"
    assert "concept: tom alone" in format_evaluation(results["tom"])
    assert card_metrics(results["tom"])["concept"] == results["tom"]["concept"]
    first, second = (found["rows"][-1]["subject"] for found in results.values())
    assert first != second
    assert len(list((config.output_dir / "evaluation/photos").glob("photo-*.png"))) == 2
    with pytest.raises(UserError, match="'cat' is none of the run's concepts: rex, tom"):
        evaluate(config, config.output_dir, [MEAN_COLOUR], replace(options, concept="cat"))


def test_a_run_of_one_set_has_no_concept_to_choose(settings):
    with pytest.raises(UserError, match=r"no data\.concepts"):
        of_concept(settings(), "rex")
