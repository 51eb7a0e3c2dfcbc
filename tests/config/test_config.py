"""Laws of the configuration: no typo trains, every mistake is told at once, what is written reads
back."""

import json
import subprocess
import sys
import time

import pytest

from tests.shared.processes import ROOT
from trainers.config import loading
from trainers.errors import UserError

FIVE = """
data: {instance_data_dir: /no/such/folder, resolutoin: 512, num_class_images: 5}
optimizer: {name: adam, learning_rate: high}
"""


@pytest.fixture
def written(tmp_path):
    """A function: YAML text -> path of a file that holds it."""

    def write(text):
        (tmp_path / "written.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return tmp_path / "written.yaml"

    return write


def complaints(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    return str(caught.value).splitlines()


def test_five_mistakes_give_five_lines_each_with_its_path_and_what_to_do(written):
    message = dict(line.split(": ", 1) for line in complaints(loading.load_config, written(FIVE)))
    expected = {
        "data.resolutoin": "did you mean data.resolution?",
        "optimizer.name": "did you mean adamw?",
        "optimizer.learning_rate": "'high'",
        "data.instance_data_dir": "/no/such/folder",
        "data.class_prompt": "requires a class prompt",
    }
    assert message.keys() == expected.keys()
    assert all(hint in message[path] for path, hint in expected.items())


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (FIVE, 5),
        ("data: {1: 2, instance_data_dir: .}", 1),
        ("on: push\ndata: {instance_data_dir: .}", 1),
    ],
    ids=["five", "number as key", "bool as key"],
)
def test_a_bad_file_exits_2_in_seconds_without_a_traceback(written, text, lines):
    start = time.monotonic()
    command = [sys.executable, "scripts/train.py", str(written(text))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert time.monotonic() - start < 10
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", lines)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_package_is_hidden_from_the_libraries():
    """transformers 5.17 to 5.20 import scikit-learn, and so scipy, with the first model."""
    script = """
from trainers import cli
cli.silence_libraries()
import gc, sys, trainers.run
import scipy.stats, kornia, bitsandbytes
from diffusers import StableDiffusionPipeline
hidden = [name for name, module in sys.modules.items() if module is None and "." not in name]
print(hidden, gc.get_threshold())
"""
    plain = subprocess.run(
        [sys.executable, "-c", "import gc; print([], gc.get_threshold())"], capture_output=True
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout == plain.stdout, done.stderr


@pytest.mark.parametrize(
    "text", ["- a\n- b", "data: [", "data: {a: b: c}", "data: \udcff", "seed: 1\nseed: 2"]
)
def test_a_file_that_cannot_be_understood_is_named(written, text):
    assert "written.yaml" in complaints(loading.load_config, written(text))[0]


def test_a_missing_file_is_named(tmp_path):
    assert "absent.yaml" in complaints(loading.load_config, tmp_path / "absent.yaml")[0]


@pytest.mark.parametrize("number", ["1e-4", "5E+3", "-1e5", "1.5e3", "0.25", "12", "-3", "0"])
def test_a_number_means_what_it_means_in_json(number):
    assert repr(loading.parse_yaml(number)) == repr(json.loads(number))


@pytest.mark.parametrize("spelling", ["1e-4", "1.0E-4", ".0001", "0.0001"])
def test_a_rate_is_a_float_in_the_file_and_in_an_override(settings, written, spelling):
    text = loading.dump_config(settings()).replace(
        "learning_rate: 0.01", f"learning_rate: {spelling}"
    )
    for loaded in (
        loading.load_config(written(text)),
        settings(f"optimizer.learning_rate={spelling}"),
    ):
        assert repr(loaded.optimizer.learning_rate) == "0.0001"


def test_an_integer_stays_one(settings):
    assert repr(settings("seed=7").seed) == "7"
    assert complaints(settings, "train.max_train_steps=1.5")[0].startswith("train.max_train_steps")


def test_an_override_equals_the_same_words_in_the_file(settings, written):
    text = loading.dump_config(settings()).replace("resolution: 16", "resolution: 24")
    assert loading.load_config(written(text)) == settings("data.resolution=24") != settings()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
        ("train.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimiser.name=adamw", "did you mean optimizer?"),
        ("lora.init_lora_weights=gausian", "did you mean gaussian?"),
        ("optimizer.name", "section.key=value"),
        ("seed.first=1", "valid integer"),
        ("data.resolution.width=1", "not a section"),
        ("optimizer.betas=[0.9", "optimizer.betas=[0.9"),
        ("optimizer.betas=[0.9, 9]", "less than 1"),
        ("optimizer.learning_rate=.inf", "finite"),
        ("lora.alpha=.nan", "lora.alpha"),
        ("data.instance_prompt=a {b: c", "data.instance_prompt"),
        ("data.concepts[rex].repeats=2", "concepts has none named rex, there are none"),
        ("train=abc", "train: input should be"),
        ("train=[1]", "train: input should be"),
        ("seed=2020-13-45", "valid integer"),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(settings, override, told):
    (line,) = complaints(settings, override)
    assert told in line


def test_wrong_overrides_are_reported_together(settings):
    assert len(complaints(settings, "optimizer", "seed=x", "lora.rnk=4", "data.resolution=9")) == 4


@pytest.mark.parametrize(
    "prompt", ["1e5", "12e4567", "1.e5", "5", "yes", "null", "010", "1:30", "é: [x", "- a", "#x"]
)
def test_what_is_dumped_loads_equal(settings, written, prompt):
    original = settings("lora.target_modules=[to_q, to_k]", "lora.alpha=3", "objective.snr_gamma=5")
    data = original.data.model_copy(update={"instance_prompt": prompt})
    original = original.model_copy(update={"data": data})
    assert loading.load_config(written(loading.dump_config(original))) == original


def test_null_lora_loads_equal(settings, written):
    assert loading.load_config(written(loading.dump_config(settings("lora=null")))).lora is None


@pytest.mark.parametrize(
    ("path", "overrides"),
    {
        "data.instance_data_dir": ["data.instance_data_dir=null"],
        "data.instance_data_dir ": ["data.instance_data_dir=/no/such/folder"],
        "data.dataset_name": ["data.dataset_name=a/b"],
        "data.class_data_dir": ["data.class_data_dir=/tmp"],
        "data.class_prompt": ["data.num_class_images=4"],
        "data.num_class_images": ["data.class_prompt=a dog"],
        "data.resolution": ["data.resolution=20"],
        "objective.debiased": ["objective.debiased=true", "objective.snr_gamma=5"],
        "optimizer.lr_warmup_steps": ["optimizer.lr_warmup_steps=5"],
        "optimizer.text_encoder_lr": ["optimizer.text_encoder_lr=1e-5"],
        "lora.target_modules": ["lora.target_modules='(to_q'"],
        "lora.use_dora": ["lora.use_dora=true", "train.train_text_encoder=true"],
        "lora.blocks": ["lora.blocks=[]"],
    }.items(),
)
def test_every_rule_between_fields_fires_alone(settings, path, overrides):
    (line,) = complaints(settings, *overrides)
    assert line.startswith(path.strip() + ": ")


@pytest.mark.parametrize(
    ("path", "override", "package"),
    [
        ("optimizer.name", "optimizer.name=adamw_8bit", "bitsandbytes"),
        ("optimizer.name", "optimizer.name=paged_adamw_8bit", "bitsandbytes"),
        ("optimizer.name", "optimizer.name=prodigy", "prodigyopt"),
        ("model.quantization", "model.quantization=nf4", "bitsandbytes"),
        ("tracking.report_to", "tracking.report_to=[tensorboard]", "tensorboard"),
        ("tracking.report_to", "tracking.report_to=[wandb]", "wandb"),
        ("tracking.report_to", "tracking.report_to=[trackio]", "trackio"),
    ],
)
def test_a_missing_package_is_named_before_anything_loads(
    settings, monkeypatch, path, override, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = complaints(settings, override)
    assert line.startswith(path)
    assert line.endswith(f"pip install {package}")


def test_the_schema_file_is_the_current_schema():
    stale = "stale: run python -m trainers.config.loading > configs/schema.json"
    assert (ROOT / "configs" / "schema.json").read_text() == loading.json_schema(), stale


def test_every_key_has_a_help_text():
    sections = json.loads(loading.json_schema())["$defs"].values()
    bare = [
        key
        for s in sections
        for key, fact in s["properties"].items()
        if not {"description", "$ref"} & fact.keys()
    ]
    assert bare == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_a_shipped_config_names_its_schema_and_validates(path):
    text = path.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    _, mistakes = loading.validate(loading.parse_yaml(text))
    assert [m for m in mistakes if "no such folder" not in m and "not installed" not in m] == []
