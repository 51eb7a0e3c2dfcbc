"""Options that should be overrides, and config files that do not exist, are told the right form."""

import pytest

from tests.shared.processes import ROOT, call
from trainers.config.command_line import override_hint, paths_named
from trainers.config.loading import load_config
from trainers.errors import UserError

QUICKSTART = "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.max_train_steps=5"], "write train.max_train_steps=5"),
        (["--max_train_steps", "5"], "write train.max_train_steps=5"),
        (["--max-train-steps=5"], "write train.max_train_steps=5"),
        (["--lora.rank", "8", "data.resolution=32"], "write lora.rank=8"),
        (["--network_dim", "8"], "write lora.rank=8"),
        (["--train_text_encoder"], "write train.train_text_encoder=true"),
        (["--train_text_encoder", "seed=1"], "write train.train_text_encoder=true"),
        (["--lerning_rate=1"], "write optimizer.learning_rate=1"),
        (["--num_processes", "2"], "accelerate launch says it"),
        (["--foo"], "as section.key=value"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "quickstart.py"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_option_is_told_the_override_that_it_should_be(
    script, words, message, is_first, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    line = [*words, QUICKSTART] if is_first else [QUICKSTART, *words]
    assert call(script, *line) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{words[0]}: there is no such option; ")
    assert told.endswith(message) or message in told


def test_all_wrong_options_are_told_at_once(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call("train.py", QUICKSTART, "--lr", "1e-4", "--rank=8", "--seed", "3") == 2
    endings = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert endings == ["optimizer.learning_rate=1e-4", "lora.rank=8", "seed=3"]


def test_a_key_of_several_sections_is_told_with_each():
    assert paths_named("guidance_scale") == ["validation.guidance_scale", "model.guidance_scale"]
    hint = override_hint("guidance_scale", "2")
    assert hint == "write validation.guidance_scale=2 or model.guidance_scale=2"


def test_dashes_before_an_override_are_told_in_python_too(settings):
    with pytest.raises(UserError, match=r"no dashes; write lora\.rank=8"):
        settings("--lora.rank=8")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("configs/quickstart.yml", "; did you mean configs/quickstart.yaml?"),
        ("config/quickstart.yaml", "; did you mean configs/quickstart.yaml?"),
        ("quickstart", "; did you mean configs/quickstart.yaml?"),
        ("quickstart_fluks.yaml", "; did you mean configs/quickstart_flux.yaml"),
        ("configs/sd35.yaml", "configs/sd35_dreambooth.yaml"),
        ("runs/rex", "; did you mean runs/rex/config.yaml?"),
        ("configs/wholly_different.yaml", "No such file or directory"),
    ],
)
def test_a_config_that_does_not_exist_is_told_with_names_that_are_near(
    path, hint, tmp_path, monkeypatch
):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs/rex").mkdir(parents=True)
    (tmp_path / "runs/rex/config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"the config {path} cannot be read: ")
    assert hint in message
    assert ("did you mean" in message) == (hint[0] in "c;")
