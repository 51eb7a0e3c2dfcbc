"""Laws of the config's limits: every number, text and list has some, and what lies outside of them
is refused by name."""

import json
import math

import pytest
import yaml

from trainers.config import KINDS, loading
from trainers.config.base_sections import Section, field
from trainers.errors import UserError

LIMITS = {
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "array": ("maxItems",),
    "string": ("maxLength",),
    "object": ("maxProperties",),
}
# pydantic's schema states both kinds of limits
ALTERNATIVES = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}


def unlimited(name, schema, definitions):
    """Paths of the values below a schema that lack a limit of their type."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if {"enum", "const"} & schema.keys() or schema.get("format") == "path":
        return []
    kind = schema.get("type")
    parts = [(f"{name}.{key}", part) for key, part in schema.get("properties", {}).items()]
    parts += [(name, part) for part in schema.get("anyOf", ())]
    parts += [(f"{name}[]", part) for part in schema.get("prefixItems", ())]
    if "items" in schema:
        parts.append((f"{name}[]", schema["items"]))
    for key in ("additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            parts.append((f"{name}{{}}", schema[key]))
    lacking = []
    # a section has its keys; a table has any
    for limit in () if "properties" in schema else LIMITS.get(kind, ()):
        value = schema.get(limit, schema.get(ALTERNATIVES.get(limit)))
        if value is None or not math.isfinite(value):
            lacking.append(f"{name}: {limit}")
    for part_name, part in parts:
        lacking += unlimited(part_name, part, definitions)
    return lacking


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_text_and_list_has_its_limits(kind):
    schema = KINDS[kind].model_json_schema()
    assert unlimited(kind, schema, schema["$defs"]) == []


def test_a_key_without_limits_would_be_noticed():
    class Careless(Section):
        steps: int = 1
        rate: float | None = None
        names: list[str] = field([], "")
        table: dict[str, int] = field({}, "")

    schema = Careless.model_json_schema()
    lacking = unlimited("careless", schema, {})
    assert {path.partition(":")[0] for path in lacking} == {
        "careless.steps",
        "careless.rate",
        "careless.names",
        "careless.names[]",
        "careless.table",
        "careless.table{}",
    }


def numeric_keys(kind):
    """Section and key of every number, with whether it may be negative."""
    schema = KINDS[kind].model_json_schema()
    found = []
    for section, reference in schema["properties"].items():
        definition = schema["$defs"].get(json.dumps(reference).rpartition("/")[2].split('"')[0])
        for key, fact in (definition or {"properties": {}})["properties"].items():
            options = fact.get("anyOf", [fact])
            if any(option.get("type") in ("integer", "number") for option in options):
                found.append(f"{section}.{key}")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value", ["1e300", "-1e300", ".inf", "-.inf", ".nan", "1e999", "9" * 400, "true", "9" * 5000]
)
def test_no_number_takes_what_is_far_outside(tmp_path, kind, value):
    keys = numeric_keys(kind)
    assert len(keys) > 15
    path = tmp_path / "config.yaml"
    path.write_text(f"kind: {kind}")
    with pytest.raises(UserError) as caught:
        loading.load_config(path, [f"{key}={value}" for key in keys])
    refused = {line.partition(":")[0].partition("=")[0] for line in str(caught.value).splitlines()}
    assert set(keys) - refused == set()


@pytest.mark.parametrize(
    "override",
    [
        "data.resolution=1000000000",
        "data.resolution=0",
        "data.resolution=-512",
        "train.train_batch_size=1000000000",
        "train.max_train_steps=0",
        "train.max_train_steps=9223372036854775808",
        "train.ema_decay=1",
        "train.ema_decay=0",
        "optimizer.learning_rate=1e300",
        "optimizer.learning_rate=-1e-4",
        "optimizer.betas=[1, 0.9]",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[-0.1, 0.9]",
        "optimizer.eps=0",
        "lora.rank=0",
        "lora.rank=100000",
        "lora.dropout=1",
        "lora.alpha=0",
        "seed=9223372036854775808",
        "seed=-1",
        "validation.seed=4294967296",
        "validation.num_images=1000000",
        "validation.guidance_scale=1e4",
        "validation.guidance_scale=-1",
        "data.caption_dropout=1.01",
        "data.num_class_images=-1",
        "objective.noise_offset=1e4",
        "checkpoint.checkpoints_total_limit=0",
        "checkpoint.every_minutes=0",
        "tracking.log_every=0",
        "tracking.report_to=[tensorboard, tensorboard, tensorboard, tensorboard]",
        f"data.instance_prompt={'a' * 20_000}",
        f"data.instance_data_dir={'a' * 5_000}",
        "data.instance_data_dir=''",
        "output_dir=''",
        "output_dir='  '",
        "output_dir=~nobody-of-this-name/runs",
    ],
)
def test_a_value_outside_of_its_limits_is_one_line_that_names_its_key(settings, override):
    with pytest.raises(UserError) as caught:
        settings(override)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(override.partition("=")[0] + ":")
    assert len(line) < 400


@pytest.mark.parametrize(
    "override",
    ["data.resolution=1024", "train.train_batch_size=128", "lora.rank=256", "seed=4294967295"],
)
def test_what_people_use_lies_within_the_limits(settings, override):
    settings(override)


def test_a_home_folder_is_written_out(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings("output_dir=~/runs/rex").output_dir == tmp_path / "runs" / "rex"


def test_what_pydantic_itself_cannot_take_is_told_by_its_key(settings, monkeypatch):
    """Whatever a library chokes on is one message, not a traceback."""

    def choke(value):
        raise OverflowError("too much")

    monkeypatch.setattr("trainers.config.bounds.Path", choke)
    tree = yaml.safe_load("data: {instance_data_dir: photos}\nseed: -1")
    _, messages = loading.validate(tree)
    assert "data.instance_data_dir: cannot be used (OverflowError: too much)" in messages
    assert any(message.startswith("seed: ") for message in messages)
