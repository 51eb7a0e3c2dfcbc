"""YAML from anywhere is read within limits: nothing in it takes long, runs code or ends in a
traceback."""

import time

import pytest
import yaml

from trainers.config import loading
from trainers.config.yaml_text import MAX_BYTES, MAX_DEPTH, ConfigDumper, parse_yaml
from trainers.errors import UserError

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!timestamp foo", "tags such as"),
        ("seed: !!python/object/apply:os.system [exit]", "tags such as"),
        ("seed: !!binary aGk=", "tags such as"),
        ("seed: !!set {a, b}", "tags such as"),
        ("seed: !own 1", "tags such as"),
        ("seed: " + "[" * 3000, f"more than {MAX_DEPTH} brackets"),
        ("seed: " + "{a: " * 3000, f"more than {MAX_DEPTH} brackets"),
        ("\n".join(" " * i + "a:" for i in range(100)), f"more than {MAX_DEPTH} brackets"),
        (BOMB, "aliases written out"),
        (MERGE_BOMB, "aliases written out"),
        ("a: &a [*a]", "within itself"),
        ("a: *b", "undefined alias"),
        ("seed: 1\nseed: 2", "line 2, column 1: the key 'seed' occurs twice"),
        ("data: {1: a, '1': b}", "the key '1' occurs twice"),
        ("seed:\n\t- 1", "indent with spaces instead of tabs"),
        ("data:\n\tresolution: 1", "indent with spaces instead of tabs"),
        ("[a, b]: c", "a key must be a word"),
        ("{a: b}: c", "a key must be a word"),
        ("seed: 1\n---\nseed: 2", "another document"),
        ("seed: \0", "#x0000"),
        ('seed: "\\0"', "NUL"),
        ('seed: "\\ud800"', "surrogate"),
        ("a: b: c", "in quotes"),
        ("seed: " + "1" * 5000, "digits"),
        ("a" * (MAX_BYTES + 1), "bytes"),
        ("seed: [", "expected the node content"),
        ("%YAML 9.9\n---\nseed: 1", "remove the line %YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_refused_is_one_line_that_says_where_and_what(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        loading.load_config(path)
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert line.startswith(f"{path} is not valid YAML: ")
    # generous: without its limit each takes minutes, or all memory
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n\0\0", bytes(range(256)), "seed: é".encode("latin-1")],
    ids=["utf-16", "png", "all bytes", "latin-1"],
)
def test_what_is_no_text_is_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not valid YAML") as caught:
        loading.load_config(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_encodings_of_text_editors_are_read(encoding):
    assert parse_yaml("a: é".encode(encoding)) == {"a": "é"}


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n"])
def test_an_empty_file_is_told(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is empty"):
        loading.load_config(path)


@pytest.mark.parametrize("text", ["- a", "text", "false", "0", "[]", "''"])
def test_only_sections_are_a_config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="must contain sections"):
        loading.load_config(path)


@pytest.mark.parametrize("path", [".", "/dev/zero", "a\0b", "a" * 5000, "no/such/file.yaml"])
def test_a_path_that_is_no_config_is_one_line(path):
    with pytest.raises(UserError) as caught:
        loading.load_config(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "off", "y", "010", "0x10", "1:30", "2024-01-01", "1_000", "0o7"]
)
def test_a_word_stays_a_word(word):
    """YAML 1.1 makes false, 8, 90 or a date of these, where a caption or a branch is meant."""
    assert parse_yaml(f"a: {word}") == {"a": word}


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "y", "010", "0x10", "1:30", "2024-01-01", "1_000", "<<", "="]
)
def test_what_is_written_means_the_same_to_other_readers(word):
    text = yaml.dump({"a": word}, Dumper=ConfigDumper)
    assert parse_yaml(text) == yaml.safe_load(text) == {"a": word}


def test_words_for_true_and_false_are_taken_where_one_is_asked_for(settings):
    config = settings("data.random_flip=yes", "data.cache=off", "train.gradient_checkpointing=on")
    assert (config.data.random_flip, config.data.cache) == (True, False)
    assert config.train.gradient_checkpointing is True


@pytest.mark.parametrize("value", ["5", "1e5", "true", "1.0"])
def test_a_number_where_text_is_asked_for_is_told_to_be_quoted(settings, value):
    with pytest.raises(UserError, match="put it in quotes"):
        settings(f"data.instance_prompt={value}")
    assert settings(f"data.instance_prompt='{value}'").data.instance_prompt == value
    assert settings(f"data.instance_prompt=!!str {value}").data.instance_prompt == value


def test_a_section_that_an_alias_shares_is_changed_in_one_place():
    tree = parse_yaml("model: &a {revision: x}\nlora: *a")
    loading.apply_override(tree, "model.revision=y")
    assert tree == {"model": {"revision": "y"}, "lora": {"revision": "x"}}


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "[" * 3000,
        "seed=&a [*a]",
        "seed=!!python/name:os.system",
        "." * 3000 + "=1",
        "a." * 3000 + "b=1",
        "seed=" + "1" * (MAX_BYTES + 1),
        "=",
        "",
        ".=",
        "seed=\ud800",
    ],
    ids=lambda value: value[:12],
)
def test_overrides_have_the_same_limits(settings, override):
    with pytest.raises(UserError) as caught:
        settings(override)
    (line,) = str(caught.value).splitlines()
    assert len(line) < 500
