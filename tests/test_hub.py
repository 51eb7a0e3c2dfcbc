"""The model card is valid metadata and runnable code; a push shares what it should with whom it
should, or says why.

The client is the real one; it talks to the small Hub of local_hub.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard, model_info, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from local_hub import Repo, serving
from PIL import Image
from processes import ROOT, call
from safetensors.torch import load, load_file

from trainers.config.loading import dump_config
from trainers.errors import UserError
from trainers.lora.export import make_metadata
from trainers.publishing import hub as publishing_hub
from trainers.publishing.markdown import escape_markdown, unescape_markdown
from trainers.publishing.model_card import add_metrics, write_dreambooth_card
from trainers.run import TASKS, run

HUB_NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NASTY = "a \"b\": 'c' # é, - [x]"
PUBLIC = [
    *(
        "README.md",
        "config.yaml",
        "figures.json",
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
        "report_public.html",
    ),
    *(
        "samples/final/00-0.png",
        "samples/final/grid.png",
        "model/config.json",
        "pipeline/unet/weights.safetensors",
    ),
]
PRIVATE = [
    *("report.html", "evaluation/photos/photo-00.png"),
    *(
        "checkpoints/step-000002/denoiser.safetensors",
        "cache/ab/abcd.safetensors",
        "metrics.jsonl",
        "tracking/events",
    ),
    *(
        "class_images/class-00000.png",
        "samples/step-000002/00-0.png",
        ".push/pytorch_lora_weights.safetensors",
    ),
]


@pytest.fixture
def card(settings):
    """A function: overrides -> the text of that run's card."""

    def write(*overrides):
        config = settings(*overrides)
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"instance_prompt": NASTY})}
        )
        config.output_dir.mkdir(exist_ok=True)
        write_dreambooth_card(config, 4, 1e-7, ["0"] * 5)
        return (config.output_dir / "README.md").read_text()

    return write


def test_a_toolkit_that_was_never_installed_still_writes_its_cards_and_headers(
    card, settings, monkeypatch
):
    """Run from its folder it has no metadata, which ended every run after its last step."""

    def lacking(name):
        if name == "diffusion-trainers":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("trainers.publishing.model_card.version", lacking)
    assert "diffusion-trainers not installed, torch 1.0" in card()
    assert (
        json.loads(make_metadata(settings())["diffusion_trainers.versions"])["diffusion-trainers"]
        == "not installed"
    )


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora.target_modules=[to_q, to_k]", "lora=null"])
def test_the_header_is_valid_metadata(card, lora):
    text = card(
        lora, f"model.pretrained_model_name_or_path={HUB_NAME}", "validation.prompts=[a b, c d]"
    )
    header, data = yaml.safe_load(text.split("---")[1]), ModelCard(text).data
    assert data.to_dict() == header  # nothing was dropped as unknown or malformed
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        HUB_NAME,
        "diffusers",
        "text-to-image",
    )
    assert header["base_model_relation"] == ("finetune" if lora == "lora=null" else "adapter")
    assert ("lora" in data.tags) == (lora != "lora=null")
    assert header["instance_prompt"] == NASTY


@pytest.mark.parametrize(
    ("family", "base", "license"),
    [
        ("sd15", HUB_NAME, {"license": "creativeml-openrail-m"}),
        (
            "sd3",
            "stabilityai/stable-diffusion-3.5-medium",
            {"license_name": "stabilityai-ai-community"},
        ),
        (
            "flux",
            "black-forest-labs/FLUX.1-dev",
            {"license_name": "flux-1-dev-non-commercial-license"},
        ),
        ("sd15", "somebody/a-base", {}),
    ],
)
def test_the_bases_licence_is_inherited_and_comfyui_is_told_its_file(
    settings, family, base, license
):
    config = settings(f"model.pretrained_model_name_or_path={base}", family=family)
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, ["0"])
    text = (config.output_dir / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert license.items() <= header.items()
    assert ("license" in header) == bool(license)
    assert header.get("license") != "other" or base in header["license_link"]
    kohya = "pytorch_lora_weights_kohya.safetensors"
    assert f"put `{kohya if family == 'sd15' else 'pytorch_lora_weights.safetensors'}` into" in text


def test_figures_measured_later_stand_in_the_card_once(settings):
    config = settings()
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, ["0"])
    before = (config.output_dir / "README.md").read_text()
    for figure in (0.25, 0.75):
        add_metrics(config.output_dir, {"subject": figure, "net": "MobileNet-I"})
    text = (config.output_dir / "README.md").read_text()
    assert text.startswith(before.rstrip())
    assert "| subject | 0.7500 |" in text
    assert "0.25" not in text.removeprefix(before.rstrip())


MARKUP = "a `b` ``c`` | *d* <b>e</b> [f](g)\n---\n# h &amp; `"


def test_text_of_the_user_does_not_become_markup_of_the_card(settings):
    """A prompt is code between more backticks than it has, in a table every sign is escaped."""
    config = settings(
        "data.num_class_images=4", f"data.class_prompt={json.dumps(MARKUP)}", "lora.rank=2"
    )
    data = config.data.model_copy(update={"instance_prompt": MARKUP})
    folder = config.output_dir.with_name("a_*run*")
    folder.mkdir()
    config = config.model_copy(update={"data": data, "output_dir": folder})
    write_dreambooth_card(config, 4, 1e-7, ["0"])
    card = ModelCard.load(folder / "README.md")
    assert card.data["instance_prompt"] == MARKUP
    line = " ".join(MARKUP.split())
    assert f"\nPrompt with ``` {line} ```.\n" in card.text
    assert card.text.startswith("\n# a\\_\\*run\\*\n")
    (row,) = re.findall(r"^\| Prior pictures \| (.*) \|$", card.text, re.MULTILINE)
    assert not re.search(r"(?<!\\)[`*|<>\[\]&]", row)
    assert repr(MARKUP) in unescape_markdown(row)


@pytest.mark.parametrize("text", [MARKUP, "_a_ __b__ c_d", "~~e~~ $f$", "\\", "\\\\*", "| |"])
def test_escaped_text_is_one_line_and_can_be_read_back(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert unescape_markdown(escaped) == " ".join(text.split())


def test_a_local_base_is_not_published_as_a_hub_name(card):
    assert ModelCard(card()).data.base_model is None


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_the_example_is_python_that_asks_for_the_prompt(card, lora):
    (code,) = re.findall(r"```python\n(.*?)```", card(lora), re.DOTALL)
    compile(code, "card", "exec")
    assert repr(NASTY) in code
    assert ("load_lora_weights" in code) == (lora != "lora=null")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing_hub, "RETRY_DELAYS", (0, 0))
    with serving(tmp_path, monkeypatch) as server:
        yield server


def test_the_pictures_of_the_card_are_shared(card, settings):
    header = yaml.safe_load(card("validation.prompts=[a b, c d]").split("---")[1])
    folder = settings().output_dir
    shown = ["samples/final/grid.png", *(entry["output"]["url"] for entry in header["widget"])]
    for name in shown:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert set(shown) < set(publishing_hub.files_to_upload(folder))


@pytest.fixture
def finished(settings):
    """A function: keys of `hub` -> Config of a run that goes to me/mine, with a folder as a run
    leaves it."""
    folder = settings().output_dir

    def make(**keys):
        for name in PUBLIC + PRIVATE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(
                b"\0" * name.endswith((".png", ".safetensors")) + name.encode()
            )
        (folder / "README.md").write_text("---\ntags: [lora]\n---\n\n# Mine\n")
        keys = {"push_to_hub": True, "hub_model_id": "me/mine"} | keys
        config = settings(*(f"hub.{key}={value}" for key, value in keys.items()))
        (folder / "config.yaml").write_text(dump_config(settings()))
        return config

    return make


@pytest.fixture(params=["xet", "lfs"])
def way(request, monkeypatch):
    """How large files travel: as the client prefers, or as it does with HF_HUB_DISABLE_XET=1."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


def send(config):
    return publishing_hub.push_run(config, publishing_hub.check_access(config))


def clone(name="me/mine", **options):
    """A repository's files as the client downloads them."""
    folder = Path(snapshot_download(name, **options))
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    del found[".gitattributes"]
    return found


def files(config):
    return {name: (config.output_dir / name).read_bytes() for name in PUBLIC}


def lora(config):
    return load_file(config.output_dir / "pytorch_lora_weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(
        tensor.equal(other[name]) for name, tensor in one.items()
    )


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
def test_who_may_not_push_is_told_before_anything_is_loaded(
    hub, settings, monkeypatch, token, name, message
):
    hub.repos |= {"me/mine": Repo(), "me/other": Repo(), "them/theirs": Repo()}
    refused(settings, monkeypatch, name, message, HF_TOKEN=token)


@pytest.mark.parametrize("trouble", ["offline", "no network", "no answer", "busy"])
def test_a_hub_that_cannot_be_asked_is_told_before_anything_is_loaded(
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
def test_wishes_that_contradict_each_other_are_refused(settings, keys, message):
    with pytest.raises(UserError, match=message):
        settings(*(f"hub.{key}" if "=" in key else f"hub.{key}=true" for key in keys.split()))


def test_whoever_does_not_push_needs_no_hub(settings, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert publishing_hub.check_access(settings("hub.hub_model_id=me/mine")) is None


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
def test_trouble_that_passes_is_not_noticed(hub, finished, way, route, status):
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
def test_a_file_that_is_refused_is_told_as_the_hub_tells_it(hub, finished, way):
    config = finished()
    repo = publishing_hub.check_access(config)
    hub.fail("PUT /lfs", 403)
    with pytest.raises(publishing_hub.PushError, match="the Hub answers 403"):
        publishing_hub.push_run(config, repo)
    assert sum("objects/batch" in route for route in hub.requests) == 1


def test_what_is_typed_goes_before_what_the_run_says(hub, finished):
    config = finished(create_pr=True)
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    assert call("push.py", config.output_dir, "--repo", "me/else", "--revision", "b") == 0
    assert hub.repos["me/else"].refs.keys() == {"main", "b"}
    assert hub.repos.keys() == {"me/else"}


@pytest.mark.parametrize(
    ("lacking", "message"), [("config.yaml", "no run folder"), ("README.md", "not finished")]
)
def test_only_a_finished_run_is_pushed(hub, finished, capsys, lacking, message):
    folder = finished().output_dir
    (folder / lacking).unlink()
    assert call("push.py", folder, "--repo", "me/mine") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_push_fails_the_run_only_if_it_is_required(
    hub, settings, tmp_path, capsys, required
):
    config = settings("hub.push_to_hub=true", f"hub.required={required}")
    (tmp_path / "train.yaml").write_text(dump_config(config))
    hub.fail("commit", 500)
    assert call("train.py", tmp_path / "train.yaml") == required
    assert lora(config)
    message = capsys.readouterr()
    (line,) = (
        line for line in (message.out + message.err).splitlines() if "scripts/push.py" in line
    )
    hub.faults.clear()
    _, *typed = shlex.split(line)
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, *typed], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(load(clone("me/run")["pytorch_lora_weights.safetensors"]), lora(config))


def test_a_pushed_lora_loads_from_the_hub_and_makes_the_runs_own_picture(hub, settings, way):
    config = settings(
        "hub.push_to_hub=true",
        "hub.hub_model_id=me/mine",
        "validation.prompts=[a b c]",
        "lora.alpha=5",
    )
    run(config)
    (code,) = re.findall(r"```python\n(.*?)```", clone()["README.md"].decode(), re.DOTALL)
    scope = {}
    exec(code.replace("PATH_OR_REPO", "me/mine"), scope)
    final = Image.open(config.output_dir / "samples/final/00-0.png")
    assert scope["image"].tobytes() == final.tobytes()
    scope["pipe"].unload_lora_weights()
    assert "GET /lfs/" in " ".join(hub.requests)


def test_uploads_while_training_are_the_weights_of_that_step_and_change_nothing(
    hub, settings, tmp_path
):
    def trained(name, *overrides):
        config = settings(f"output_dir={tmp_path}/{name}", *overrides)
        run(config)
        return lora(config)

    pushed = (
        "hub.push_to_hub=true",
        "hub.hub_model_id=me/mine",
        "hub.push_every=2",
        "train.ema_decay=0.5",
    )
    two, six = trained("two", *pushed[-1:], "train.max_train_steps=2"), trained("six", *pushed[-1:])
    assert same(trained("good", *pushed), six)
    *_, first = hub.repos["me/mine"].log()
    assert first == "Weights at step 2"
    assert same(
        load(
            hub.repos["me/mine"].refs["main"][1].files["pytorch_lora_weights.safetensors"].content
        ),
        two,
    )
    assert hub.repos["me/mine"].log()[0] == "Add trained weights"
    assert not (tmp_path / "good/.push").exists()
    hub.fail("commit", 500)
    with pytest.warns(UserWarning, match="the upload at step 2 failed: the Hub answers 500"):
        assert same(trained("bad", *pushed), six)


@pytest.fixture
def uploads(hub, settings):
    """A `PushToHub` every second step of six, of a task that notes which steps it saved."""
    config, saved = (
        settings("hub.push_to_hub=true", "hub.hub_model_id=me/mine", "hub.push_every=2"),
        [],
    )
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))

    def save(folder):
        saved.append(len(saved))
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0%d" % len(saved))

    task = SimpleNamespace(players={}, save=save, saved=saved)
    return publishing_hub.PushToHub(task, config, publishing_hub.check_access(config))


def test_an_upload_that_lasts_is_not_joined_by_another(uploads):
    uploads.job = Future()
    uploads(2, {})
    assert not uploads.task.saved
    uploads.job.set_result(None)
    uploads(4, {})
    assert len(uploads.task.saved) == 1
    uploads.job.result()


def test_uploads_come_every_so_many_steps_before_the_last(hub, uploads):
    uploads.folder.mkdir()
    (uploads.folder / "of_a_run_that_was_killed.safetensors").touch()
    for step in range(1, 7):
        uploads(step, {})
        if uploads.job:
            uploads.job.result()
    assert hub.repos["me/mine"].log() == ["Weights at step 4", "Weights at step 2"]
    assert clone().keys() == {"config.yaml", "pytorch_lora_weights.safetensors"}


def test_failing_uploads_warn_once(hub, uploads, recwarn):
    hub.fail("commit", 500)
    for step in (2, 4):
        uploads(step, {})
        uploads.job.result()
    assert [str(warning.message)[:23] for warning in recwarn] == ["the upload at step 2 fa"]
    hub.faults.clear()
    uploads(2, {})
    uploads.job.result()
    assert len(hub.repos["me/mine"].log()) == 1


def test_other_processes_upload_nothing(uploads):
    other = publishing_hub.PushToHub(uploads.task, uploads.config, None)
    other(2, {})
    other.finish()
    assert not uploads.task.saved
