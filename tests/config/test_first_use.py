"""The mistakes of a first day are told with what to do: names that other trainers have, a base that
is none, a regex that is none, and wrong facts of a family."""

import pytest

from trainers.base_model import find_base_model
from trainers.config import KINDS, loading
from trainers.config.dreambooth_rules import base_problem
from trainers.config.family_facts import FOLDER, family_facts, family_names, read_facts
from trainers.config.layer_patterns import fullmatch
from trainers.config.peer_keys import LAUNCHER_FLAGS, NAMES_BY_PATH, PATHS_BY_NAME
from trainers.errors import UserError
from trainers.families import detect_family


def one_line(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("data.train_data_dir", "data.instance_data_dir"),
        ("data.reg_data_dir", "data.class_data_dir"),
        ("train_data_dir", "data.instance_data_dir"),
        ("lora.network_dim", "lora.rank"),
        ("network_alpha", "lora.alpha"),
        ("lora.linear", "lora.rank"),
        ("optimizer.unet_lr", "optimizer.learning_rate"),
        ("train.steps", "train.max_train_steps"),
        ("train.batch_size", "train.train_batch_size"),
        ("objective.min_snr_gamma", "objective.snr_gamma"),
        ("validation.validation_prompt", "validation.prompts"),
        ("train.num_processes", "--num_processes N"),
        ("network", "lora"),
    ],
)
def test_another_trainers_key_is_told_our_name(settings, key, ours):
    line = one_line(settings, f"{key}=1")
    assert line.startswith(f"{key}: unknown key; ")
    assert ours in line


def test_every_key_that_is_suggested_exists():
    known = {path for model in KINDS.values() for path in loading.known_paths(model)}
    assert set(NAMES_BY_PATH) - known == set()


def test_no_name_of_others_is_a_key_of_ours_or_stands_for_two():
    names = " ".join(NAMES_BY_PATH.values()).split()
    assert len(names) == len(set(names)) == len(PATHS_BY_NAME)
    known = {path for model in KINDS.values() for path in loading.known_paths(model)}
    ours = {path.rpartition(".")[2] for path in known}
    # a section `optimizer` or a key `dropout` is reported as unknown only where it is misplaced
    assert (set(names) | set(LAUNCHER_FLAGS)) & ours == set()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./base", "no such folder"),
        ("models/sd/15", "no such folder"),
        ("C:\\models\\sd15", "no such folder"),
        ("model.safetensors", "no such file"),
        ("/no/such/model.ckpt", "is a file that is not opened"),
        ("someone/model.gguf", "is a file that is not opened"),
        ("https://huggingface.co/a/b", "the name of the repository, a/b"),
        ("https://huggingface.co/a/b/tree/main", "the name of the repository, a/b"),
        ("https://civitai.com/models/1", "is an address"),
        ("s3://bucket/base", "is an address"),
        ("", "must not be empty"),
        ("a" * 999, None),
        ("someone/a-base", None),
        ("gpt2", None),
    ],
)
def test_a_base_model_that_is_none_is_told_what_it_is(settings, name, message):
    problem = base_problem(name)
    if message is None:
        assert problem is None
        return
    assert message in problem
    line = one_line(settings, f"model.pretrained_model_name_or_path='{name}'")
    assert line == f"model.pretrained_model_name_or_path: {problem}"
    assert message in one_line(detect_family, name)


def test_a_file_without_an_ending_is_no_base_either(tmp_path):
    (tmp_path / "model").touch()
    assert "is a file that is not opened" in base_problem(str(tmp_path / "model"))


def test_a_base_that_was_given_later_is_checked_too(settings):
    model = settings().model.model_copy(update={"pretrained_model_name_or_path": "x.safetensors"})
    assert "no such file" in one_line(find_base_model, None, model)


def test_a_folder_that_is_a_file_or_no_name_is_told(settings, tmp_path):
    (tmp_path / "file").touch()
    assert "this is a file" in one_line(settings, f"data.instance_data_dir={tmp_path}/file")
    assert "no such folder" in one_line(settings, "data.instance_data_dir=/no/such")
    assert "name too long" in one_line(settings, f"data.instance_data_dir={'a' * 300}")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a",
        "[",
        "*",
        "a{99999999999}",
        "a{1,99999999999999999999}",
        "((a{1000}){1000}){1000}",
        "(" * 480 + ")" * 480,
        "(?R)",
        "(?P<a>x)(?P<a>y)",
        "\\U0010ffff",
        "é",
        r"(.|..|...)*(?<!_)",
        "a" * 1001,
    ],
    ids=lambda pattern: pattern[:16],
)
def test_a_regex_that_is_bad_or_slow_is_one_message(settings, pattern):
    line = one_line(settings, f"lora.target_modules='{pattern}'")
    assert line.startswith("lora.target_modules: ")
    assert len(line) < 300


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"transformer_blocks\.\d+\.attn\.to_[qkv]", True),
        (r".*\.to_(q|k|v)", True),
        (r"transformer_blocks\.(1[0-9]|2)\..*to_q", True),
        (r"(?i).*TO_Q", True),
        (r"to_q", False),
        (r".*to_q.", False),
    ],
)
def test_a_regex_of_layers_matches_the_whole_name(settings, pattern, matches):
    assert fullmatch(pattern, "transformer_blocks.12.attn.to_q") is matches
    settings(f"lora.target_modules='{pattern}'")


@pytest.mark.parametrize("name", family_names())
def test_the_facts_of_a_family_name_keys_and_values_that_exist(name):
    facts = family_facts(name)
    known = set(loading.known_paths(KINDS["dreambooth"]))
    paths = {f"{section}.{key}" for section, keys in facts.config_keys.items() for key in keys}
    paths |= {refused.partition("=")[0] for refused in facts.refused}
    assert paths - known == set()
    assert {"attention", "mlp"} <= facts.lora_targets.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pixel_multiple: 8", "pixel_multiple: 0", "pixel_multiple: "),
        ("pixel_multiple: 8", "pixel_multiple: 10000", "pixel_multiple: "),
        ("pixel_multiple: 8", "pixel_multipel: 8", "pixel_multipel: "),
        ("title: SD1.5", "title: SD1.5\ntitle: x", "occurs twice"),
        ("lora: true", "lora: {}", "text_encoders.text_encoder.lora: "),
        ("title: SD1.5", "title: [", "not valid YAML"),
    ],
)
def test_wrong_facts_name_the_file_and_the_key(tmp_path, old, new, message):
    text = (FOLDER / "sd15.yaml").read_text("utf-8")
    path = tmp_path / "sd15.yaml"
    path.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(UserError) as caught:
        read_facts(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    assert any(message in line for line in lines)
