"""Who may not push, or cannot, is told before anything is loaded."""

import re

import pytest

from tests.shared.hub_repositories import Repo
from trainers.config import AutoencoderConfig
from trainers.errors import UserError
from trainers.publishing import hub as publishing_hub
from trainers.publishing.step_release import step_release
from trainers.run import TASKS, run
from trainers.training.run_weights import RunWeights


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_read", "me/mine", "token 'laptop' may only read"),
        ("hf_read", "me/new", "token 'laptop' may only read"),
        ("hf_fine", "me/other", "cannot push to me/other: the Hub answers 403"),
        ("hf_fine", "me/new", "cannot push to me/new: the Hub answers 403"),
        ("hf_write", "them/theirs", "cannot push to them/theirs: the Hub answers 403"),
        ("hf_write", "a b", "cannot push to a b"),
        ("hf_wrong", "me/mine", "the Hub answers 401"),
        ("", "me/mine", "not logged in"),
    ],
)
def test_a_push_without_the_right_to_it_is_refused_before_anything_is_loaded(
    hub, settings, monkeypatch, token, name, message
):
    hub.repos |= {"me/mine": Repo(), "me/other": Repo(), "them/theirs": Repo()}
    refused(settings, monkeypatch, name, message, HF_TOKEN=token)


@pytest.mark.parametrize("trouble", ["offline", "no network", "no answer", "busy"])
def test_an_unreachable_hub_is_reported_before_anything_is_loaded(
    hub, settings, monkeypatch, trouble
):
    match trouble:
        case "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        case "no network":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        case "no answer":
            hub.fail("repos/create", None)
        case "busy":
            hub.fail("whoami", 503)
    messages = {"offline": "HF_HUB_OFFLINE is set", "busy": "the Hub answers 503"}
    refused(
        settings, monkeypatch, "me/mine", messages.get(trouble, "no answer from http://127.0.0.1:")
    )


def refused(settings, monkeypatch, name, message, **environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    monkeypatch.setitem(TASKS, "dreambooth", lambda *_: pytest.fail("something was loaded"))
    config = settings("hub.push_to_hub=true", f"hub.hub_model_id={name}")
    with pytest.raises(UserError, match=f"^hub.push_to_hub: .*{re.escape(message)}"):
        run(config)
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "push_to_hub create_pr hub_revision=b",
            "hub.create_pr: a pull request always targets the main branch",
        ),
        (
            "push_to_hub create_pr push_every=2",
            "hub.push_every: cannot be combined with hub.create_pr",
        ),
        ("push_every=2", "hub.push_every: has no effect unless hub.push_to_hub is true"),
        ("required", "hub.required: has no effect unless hub.push_to_hub is true"),
    ],
)
def test_hub_options_that_contradict_each_other_are_refused(settings, keys, message):
    with pytest.raises(UserError, match=message):
        settings(*(f"hub.{key}" if "=" in key else f"hub.{key}=true" for key in keys.split()))


def test_whoever_does_not_push_needs_no_hub(settings, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert publishing_hub.check_access(settings("hub.hub_model_id=me/mine")) is None


def test_the_best_of_a_small_network_that_was_stopped_has_no_card_yet(tmp_path):
    (tmp_path / "best/model").mkdir(parents=True)
    best = RunWeights(tmp_path, AutoencoderConfig(), 3, is_best=True)
    with (
        pytest.raises(UserError, match=r"not finished: it has no README.md, of which .*@best"),
        step_release(best),
    ):
        pass
