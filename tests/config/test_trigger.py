"""The trigger word stands in every prompt where the config has a place for it."""

import pytest

from trainers.config import loading
from trainers.config.trigger import fill_given, mentions
from trainers.data.caption_variants import Wording
from trainers.errors import UserError
from trainers.evaluate import EvaluationOptions, of_concept, plan_samples
from trainers.publishing.model_card import card_prompt

PLACES = (
    "data.instance_prompt='a {trigger} dog'",
    "data.class_prompt=['a dog', 'no [trigger]']",
    "data.num_class_images=2",
    "data.caption_prefix='{trigger}, '",
    "validation.prompts=['[trigger] {trigger}', plain]",
    "validation.negative_prompt='[trigger]'",
)


def test_it_stands_in_every_prompt_and_the_config_in_the_run_folder_loads_alike(settings, tmp_path):
    config = settings("data.trigger=sks", *PLACES)
    assert config.data.instance_prompt == "a sks dog"
    assert config.data.class_prompts == ["a dog", "no sks"]
    assert config.data.caption_prefix == "sks, "
    assert config.validation.prompts == ["sks sks", "plain"]
    assert config.validation.negative_prompt == "sks"
    (tmp_path / "again.yaml").write_text(loading.dump_config(config))
    assert loading.load_config(tmp_path / "again.yaml") == config


def test_each_place_without_a_trigger_is_named(settings):
    with pytest.raises(UserError) as caught:
        settings(*PLACES)
    lines = str(caught.value).splitlines()
    assert {line.partition(":")[0] for line in lines} == {
        "data.instance_prompt",
        "data.class_prompt",
        "data.caption_prefix",
        "validation.prompts",
        "validation.negative_prompt",
    }
    assert all("set it by data.trigger" in line for line in lines)


def test_what_concepts_share_has_the_trigger_of_each(settings):
    concepts = "[{name: a, instance_data_dir: ., trigger: zwx}, {name: b, instance_data_dir: .}]"
    shared = ("data.caption_prefix='{trigger},'", "data.caption_suffix='by [trigger]'")
    alone = ("data.instance_data_dir=null", "data.instance_prompt=null")
    config = settings(*alone, *shared, f"data.concepts={concepts}", "data.trigger=sks")
    for photos, trigger in zip(config.data.sets, ("zwx", "sks"), strict=True):
        wording = Wording.from_config(config.data, photos.trigger)
        assert wording.complete("a dog") == f"{trigger}, a dog by {trigger}"
    with pytest.raises(UserError, match=r"^data\.caption_prefix: .*set it by data\.trigger"):
        settings(*alone, *shared, f"data.concepts={concepts}")
    each = concepts.replace("name: b", "name: b, trigger: ohwx, instance_prompt: 'a [trigger] dog'")
    own = settings(*alone, *shared, f"data.concepts={each}")
    assert own.data.trigger is None
    # of the card, and of an evaluation of the concept
    text = "ohwx, a ohwx dog by ohwx"
    assert card_prompt(own) == text
    options = EvaluationOptions(num_images=1)
    assert plan_samples(of_concept(own, "b")[0], [], options)["subject"][0][0] == text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.trigger=' '"], r"data\.trigger: .*no word"),
        (["data.trigger='sks '"], r"data\.trigger: .*no word"),
        (["data.trigger='sks, dog'"], r"data\.trigger: .*comma"),
        (["data.trigger='[trigger]'"], r"data\.trigger: .*such as sks"),
        (["data.trigger=7"], r"data\.trigger: .*put it in quotes"),
        (["data.trigger=sks", "data.class_prompt={a: b}"], r"^data\.class_prompt: "),
        (["data.keep_tags=1"], r"data\.keep_tags: has no effect.*data\.shuffle_tags"),
        (["data.caption_variants=3"], r"data\.caption_variants: has no effect"),
        (["data.caption_lines=both"], r"data\.caption_lines: 'both' is not one of join, choose"),
    ],
)
def test_what_means_nothing_is_refused_by_its_key(settings, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(*overrides)


def test_a_prompt_of_a_command_line_has_the_trigger_of_the_run():
    assert fill_given(["a {trigger}", "b"], "sks") == ["a sks", "b"]
    assert fill_given(["b"], None) == ["b"]
    with pytest.raises(UserError, match=r"no data\.trigger"):
        fill_given(["a {trigger}"], None)


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        ("a photo of sks dog", True),
        ("SKS, dog", True),
        ("a sks.", True),
        ("asks dog", False),
        ("sks1", False),
        ("", False),
    ],
)
def test_a_text_mentions_the_trigger_as_a_whole_word(text, is_there):
    assert mentions(text, "sks") == is_there
