"""A push shares what it should, and the command after a failure makes the same push."""

import shlex

import pytest
from huggingface_hub import model_info
from huggingface_hub.errors import RepositoryNotFoundError

from tests.shared.hub_repositories import Repo
from tests.shared.processes import call
from tests.shared.pushed_runs import clone, files, send
from trainers.config.loading import dump_config
from trainers.errors import UserError
from trainers.publishing import hub as publishing_hub


def test_a_clone_has_what_is_for_others_and_nothing_else(hub, finished, way):
    config = finished()
    assert send(config).startswith("pushed to ")
    assert clone() == files(config)
    assert any(route.startswith("PUT /lfs") for route in hub.requests) == (way == "lfs")


def test_a_push_commits_what_is_new_and_nothing_when_nothing_is(hub, finished, way):
    config = finished()
    send(config)
    assert "nothing new" in send(config)
    assert hub.repos["me/mine"].log() == ["Add trained weights"]
    (config.output_dir / "kohya.safetensors").write_bytes(b"\0other")
    assert send(config).startswith("pushed to ")
    assert len(hub.repos["me/mine"].log()) == 2
    assert clone() == files(config)


def test_a_private_repository_is_not_seen_by_others(hub, finished):
    config = finished(private=True)
    send(config)
    assert clone() == files(config)
    with pytest.raises(RepositoryNotFoundError):
        model_info("me/mine", token=False)


def test_what_is_private_does_not_go_to_a_public_repository(hub, finished):
    hub.repos["me/mine"] = Repo()
    with pytest.raises(UserError, match=r"hub.private: me/mine .* public"):
        send(finished(private=True))


def test_a_branch_is_made_if_it_is_lacking_and_main_stays(hub, finished, way):
    config = finished(hub_revision="runs/one")
    send(config)
    assert clone(revision="runs/one") == files(config)
    assert clone() == {}
    assert "nothing new" in send(config)


def test_anybody_may_propose_to_a_repository_of_others(hub, finished, way):
    hub.repos["them/theirs"] = Repo()
    config = finished(hub_model_id="them/theirs", create_pr=True)
    assert send(config).endswith("them/theirs/discussions/1")
    assert clone("them/theirs", revision="refs/pr/1") == files(config)
    assert clone("them/theirs") == {}


@pytest.mark.parametrize(
    ("way", "route", "status"),
    [
        ("lfs", "PUT /lfs", 503),
        ("lfs", "PUT /lfs", None),
        *((way, "commit", status) for way in ("xet", "lfs") for status in (503, None)),
        ("xet", "preupload", 500),
        ("xet", "GET .*me/mine$", 500),
    ],
    indirect=["way"],
)
def test_failures_that_pass_are_retried_in_silence(hub, finished, way, route, status):
    config = finished()
    publishing_hub.check_access(config)
    hub.fail(route, status, times=2)
    assert publishing_hub.push_run(config, "me/mine").startswith("pushed to ")
    assert all(fault.times == 0 for fault in hub.faults)
    assert len(hub.repos["me/mine"].log()) == 1
    assert clone() == files(config)


@pytest.mark.parametrize(
    "keys", [{}, {"private": True}, {"hub_revision": "a branch"}, {"create_pr": True}], ids=str
)
def test_the_command_after_a_failure_makes_the_same_push(hub, finished, way, keys):
    config = finished(**keys)
    publishing_hub.check_access(config)
    before = files(config)
    hub.fail("commit", 403)
    with pytest.raises(
        publishing_hub.PushError, match="the upload to me/mine failed: the Hub answers 403"
    ) as caught:
        publishing_hub.push_run(config, "me/mine")
    assert sum("commit" in route for route in hub.requests) == 1, (
        "it asked again although the answer was final"
    )
    assert files(config) == before
    assert clone(revision=keys.get("hub_revision")) == {}
    hub.faults.clear()
    python, script, *arguments = shlex.split(str(caught.value).splitlines()[-1])
    assert (python, script) == ("python", "scripts/push.py")
    del hub.repos["me/mine"]
    assert call("push.py", *arguments) == 0
    assert hub.repos["me/mine"].private == ("private" in keys)
    assert (
        clone(revision="refs/pr/1" if "create_pr" in keys else keys.get("hub_revision")) == before
    )


@pytest.mark.parametrize("way", ["lfs"], indirect=True)
def test_a_refused_file_is_reported_in_the_words_of_the_hub(hub, finished, way):
    config = finished()
    repo = publishing_hub.check_access(config)
    hub.fail("PUT /lfs", 403)
    with pytest.raises(publishing_hub.PushError, match="the Hub answers 403"):
        publishing_hub.push_run(config, repo)
    assert sum("objects/batch" in route for route in hub.requests) == 1


def test_command_line_options_override_those_of_the_run(hub, finished):
    config = finished(create_pr=True)
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    assert call("push.py", config.output_dir, "--repo", "me/else", "--revision", "b") == 0
    assert hub.repos["me/else"].refs.keys() == {"main", "b"}
    assert hub.repos.keys() == {"me/else"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-3], "not a whole safetensors file"),
        (lambda content: content[:-4] + b"\xff\xff\xff\xff", "NaN or infinite"),
    ],
)
def test_weights_that_are_damaged_are_not_pushed(hub, finished, capsys, damage, message):
    folder = finished().output_dir
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert call("push.py", folder, "--repo", "me/mine") == 2
    assert message in capsys.readouterr().err
    assert not hub.repos


@pytest.mark.parametrize(
    ("lacking", "message"), [("config.yaml", "no run folder"), ("README.md", "not finished")]
)
def test_only_a_finished_run_is_pushed(hub, finished, capsys, lacking, message):
    folder = finished().output_dir
    (folder / lacking).unlink()
    assert call("push.py", folder, "--repo", "me/mine") == 2
    assert message in capsys.readouterr().err
