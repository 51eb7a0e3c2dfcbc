"""Several sets of photos in another trainer's config become concepts, and one the plain keys."""

import json

import pytest
import yaml

from trainers.config import loading
from trainers.config.importers import import_config

DOG = {"instance_data_dir": "/dog", "instance_prompt": "a sks dog"}
CAT = {"instance_data_dir": "/cat", "instance_prompt": "a zwx cat", "repeats": 3}
AI_TOOLKIT = """
job: extension
config:
  name: two
  process:
    - type: sd_trainer
      trigger_word: trg
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
      network: {linear: 16}
      datasets:
        - {folder_path: /dog, default_caption: a sks dog, resolution: [512], mask_path: /masks}
        - {folder_path: /cat, default_caption: a zwx cat, resolution: [512], num_repeats: 3}
        - {folder_path: /both, resolution: [768], alpha_mask: true}
        - {folder_path: /dogs, default_caption: a dog, is_reg: true}
"""
KOHYA = """
[general]
shuffle_caption = true
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "/dog"
  class_tokens = "a sks dog"
  conditioning_data_dir = "/masks"
  [[datasets.subsets]]
  image_dir = "/cat"
  class_tokens = "a zwx cat"
  num_repeats = 3
  keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "/animals"
  class_tokens = "an animal"
  is_reg = true
"""
SIMPLETUNER = {
    "model_type": "lora",
    "model_family": "sd3",
    "data_backend_config": [
        {"id": "embeds", "dataset_type": "text_embeds"},
        {"id": "my dog!", **DOG, "resolution": 768},
        {"id": "cat", "instance_data_dir": "/cat", "instance_prompt": "a zwx cat", "repeats": 2},
        {"id": "off", "instance_data_dir": "/off", "disabled": True},
    ],
}
ONETRAINER = {
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_15",
    "masked_training": True,
    "unmasked_weight": 0.2,
    "concepts": [
        {"name": "dog", "path": "/dog", "type": "STANDARD", "balancing": 1.0},
        {"name": "Dog", "path": "/cat", "type": "STANDARD", "balancing": 3.0},
        {"name": "off", "path": "/off", "enabled": False},
        {"name": "seen", "path": "/held", "type": "VALIDATION"},
    ],
}


def imported(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    config = import_config(file)
    assert yaml.safe_load(config.to_yaml()) == config.tree()
    return config


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.yaml",
            AI_TOOLKIT,
            [
                {"class_data_dir": "/dogs", "class_prompt": "a dog", **DOG, "mask_dir": "/masks"},
                {"class_data_dir": "/dogs", "class_prompt": "a dog", **CAT},
                {
                    "instance_prompt": "[trigger]",
                    "class_data_dir": "/dogs",
                    "class_prompt": "a dog",
                    "instance_data_dir": "/both",
                    "use_alpha_mask": True,
                },
            ],
        ),
        (
            "a.toml",
            KOHYA,
            [
                {"class_data_dir": "/animals", "class_prompt": "an animal", "mask_dir": "/masks"}
                | DOG,
                {"class_data_dir": "/animals", "class_prompt": "an animal", **CAT},
            ],
        ),
        (
            "a.json",
            SIMPLETUNER,
            [{"name": "my-dog", **DOG, "repeats": 1}, {"name": "cat", **CAT}],
        ),
        (
            "a.json",
            ONETRAINER,
            [
                {"name": "dog", "held_out_dir": "/held", "instance_data_dir": "/dog"}
                | {"repeats": 1, "mask_dir": "/dog"},
                {"name": "Dog-2", "held_out_dir": "/held", "instance_data_dir": "/cat"}
                | {"repeats": 3, "mask_dir": "/cat"},
            ],
        ),
    ],
    ids=["ai-toolkit", "kohya", "SimpleTuner", "OneTrainer"],
)
def test_each_set_is_a_concept(tmp_path, name, content, expected):
    config = imported(tmp_path, name, content)
    found = config.value("data.concepts")
    for concept in found:
        concept.setdefault("repeats", 1)
    assert found == [{"repeats": 1} | concept for concept in expected]
    # nothing of a set is said twice
    data = config.tree()["data"]
    assert not {"instance_data_dir", "instance_prompt", "class_data_dir"} & data.keys()


def test_what_a_set_says_and_has_no_equal_is_listed(tmp_path):
    left = imported(tmp_path, "a.toml", KOHYA).leftovers()
    assert left == {"subset 2: keep_tokens": 2}
    left = imported(tmp_path, "a.yaml", AI_TOOLKIT).leftovers()
    assert left == {"datasets 3.resolution": [768]}


def test_how_much_counts_outside_of_masks_is_taken_over(tmp_path):
    assert imported(tmp_path, "a.json", ONETRAINER).value("data.mask_floor") == 0.2
    assert imported(tmp_path, "a.toml", KOHYA).value("data.mask_floor") == 0


def test_one_set_is_written_in_the_plain_keys(tmp_path):
    one = {**SIMPLETUNER, "data_backend_config": SIMPLETUNER["data_backend_config"][:2]}
    config = imported(tmp_path, "a.json", one)
    assert config.tree()["data"] == {**DOG, "resolution": 768}


def test_the_result_is_read_as_concepts(tmp_path):
    content = json.loads(json.dumps(ONETRAINER))
    for name in ("dog", "cat", "held"):
        (tmp_path / name).mkdir()
    for concept in content["concepts"]:
        concept["path"] = str(tmp_path) + concept["path"]
    content["base_model_name"] = str(tmp_path)
    (tmp_path / "ours.yaml").write_text(imported(tmp_path, "a.json", content).to_yaml())
    data = loading.load_config(tmp_path / "ours.yaml").data
    assert [photos.name for photos in data.sets] == ["dog", "Dog-2"]
    assert data.has_masks
