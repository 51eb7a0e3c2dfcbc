"""What leaves the machine tells nothing of where, by whom and from which files it was made, and no
text of the user becomes markup."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open

from tests.shared.pictures import PICTURE
from trainers.config import loading
from trainers.config.loading import dump_config, load_config
from trainers.lora.export import make_metadata
from trainers.publishing import hub as publishing_hub
from trainers.publishing.model_card import add_metrics, write_dreambooth_card
from trainers.publishing.public import is_local, public_config, public_text
from trainers.publishing.report import write_report
from trainers.run import run

PERSON, PLACE = "annagreta", "secretplace"
HOSTILE = [
    "## Measured",
    "a\n\n## Evaluation\n\n| fake | 1 |",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "``` `` `",
    "`a` ``b``",
    "---\ntags: [fake]\n---",
    "a\n---\nlicense: fake\n---\n",
    "'\": {[}] # & * ! % @ ~",
    "![x](http://example.org/x.png) [y](javascript:alert(1))",
    "http://example.org <http://example.org>",
    "$x$ **b** __c__ ~~d~~ &lt;",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028## Measured\u2029\x85## Measured",
    "- [x] done\n1. one\n> quote",
    "quotes \" \\ ' in python\n```\nimport os",
    "é 漢字 \U0001f600",
]


@pytest.fixture
def at_home(settings, bases, photos, tmp_path, monkeypatch):
    """A function: overrides -> the config of a one-step run in places that are named after a
    person, as are the photos, the machine and the user."""
    monkeypatch.setattr("socket.gethostname", lambda: f"{PERSON}-box")
    monkeypatch.setenv("USER", PERSON)
    home = tmp_path / PLACE / PERSON
    (home / "photos").mkdir(parents=True)
    for path in sorted(photos.iterdir()):
        shutil.copy(path, home / "photos" / f"{PERSON}-{path.name}")
    shutil.copytree(bases["sd15"], home / "base")

    def make(*overrides):
        return settings(
            f"output_dir={home}/run",
            f"model.pretrained_model_name_or_path={home}/base",
            f"data.instance_data_dir={home}/photos",
            f"data.cache_dir={home}/cache",
            f"tracking.project_name={PERSON}",
            "train.max_train_steps=1",
            "optimizer.lr_warmup_steps=0",
            "validation.prompts=[a b c]",
            "hub.push_to_hub=true",
            "hub.hub_model_id=me/mine",
            *overrides,
        )

    return make


def private_words(tmp_path):
    """What must not be found; the machine and the user are named after the person too."""
    return [PERSON, PLACE, str(tmp_path), str(Path.home()) + "/"]


def found_in(files, words):
    """(file, word) for each private word in the bytes of a file."""
    return [
        (name, word)
        for name, content in files.items()
        for word in words
        if word.lower().encode() in content.lower()
    ]


@pytest.mark.parametrize(
    "overrides",
    [("train.train_text_encoder=true", "hub.push_every=1"), ("lora=null",)],
    ids=["lora", "all weights"],
)
def test_a_pushed_run_tells_nothing_of_the_machine(hub, at_home, tmp_path, overrides):
    config = at_home(*overrides)
    run(config)
    files = {
        name: file.content for name, file in hub.repos["me/mine"].refs["main"][-1].files.items()
    }
    assert {"README.md", "config.yaml", "report_public.html"} < files.keys()
    assert found_in(files, private_words(tmp_path)) == []
    # the run folder's own config has them all, for the run must go on
    own = (config.output_dir / "config.yaml").read_text()
    assert PERSON in own
    headers = list(config.output_dir.glob("*.safetensors"))
    assert len(headers) == (2 if config.lora else 0)
    for path in headers:
        with safe_open(path, "pt") as opened:
            assert f"{opened.metadata()}".count(PERSON) == 0


def test_weights_that_go_while_training_tell_nothing_either(hub, at_home, tmp_path):
    config = at_home("hub.push_every=1", "train.max_train_steps=2")
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    task = SimpleNamespace(players={}, save=lambda folder: None)
    push = publishing_hub.PushToHub(task, config, publishing_hub.check_access(config))
    push(1, {})
    push.job.result()
    (content,) = [
        file.content
        for name, file in hub.repos["me/mine"].refs["main"][-1].files.items()
        if name == "config.yaml"
    ]
    assert found_in({"config.yaml": content}, private_words(tmp_path)) == []


def test_a_public_config_keeps_names_on_the_hub_and_all_numbers(at_home):
    config = at_home("model.revision=abc")
    name = {"pretrained_model_name_or_path": "someone/a-base"}
    on_hub = config.model_copy(update={"model": config.model.model_copy(update=name)})
    shared = public_config(on_hub)
    assert shared.model == on_hub.model
    assert shared.train == on_hub.train
    assert shared.data.instance_prompt == on_hub.data.instance_prompt
    tree = yaml.safe_load(public_text(on_hub))
    assert {"hub", "tracking", "checkpoint"}.isdisjoint(tree)
    assert tree["data"]["instance_data_dir"] == "INSTANCE_DATA_DIR"
    assert tree["output_dir"] == "mine"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", False),
        ("me/a-model.v1", False),
        ("/home/x/base", True),
        ("./base", True),
        ("../base", True),
        ("~/base", True),
        ("C:\\Users\\x\\base", True),
        ("models/x/base", True),
        ("tests", True),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_place_here(name, expected, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local(name) == expected


@pytest.mark.parametrize("kind", ["autoencoder", "gan", "unet"])
def test_every_path_of_every_kind_has_a_placeholder(tmp_path, kind):
    folder = tmp_path / PERSON
    folder.mkdir()
    path = tmp_path / "config.yaml"
    extra = {"unet": "use: colorize\n"}.get(kind, "")
    channels = 3 if kind == "unet" else 1
    path.write_text(
        f"kind: {kind}\n{extra}output_dir: {folder}/run\n"
        f"data: {{image_dir: {folder}, channels: {channels}, resolution: 32}}\n"
        "tracking: {report_to: []}\ntrain: {train_batch_size: 2}\n"
        f"checkpoint: {{resume_from_checkpoint: {folder}/run/checkpoints/step-000001}}\n"
    )
    config = load_config(path)
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    page = write_report(config.output_dir, pictures=False).read_bytes()
    files = {"config.yaml": public_text(config).encode(), "report": page}
    assert found_in(files, [PERSON, str(tmp_path)]) == []


@pytest.fixture
def card(settings):
    """A function: prompt -> config and the text of the card of a run with it, in all places."""

    def write(prompt, name="run"):
        config = settings()
        data = {"instance_prompt": prompt, "class_prompt": prompt, "num_class_images": 1}
        config = config.model_copy(
            update={
                "output_dir": config.output_dir.parent / name,
                "data": config.data.model_copy(update=data),
                "validation": config.validation.model_copy(update={"prompts": [prompt]}),
            }
        )
        config.output_dir.mkdir(exist_ok=True)
        write_dreambooth_card(config, 6, 1e-7, [PICTURE])
        return config, (config.output_dir / "README.md").read_text()

    return write


def tokens(text):
    """The kinds of the tokens of a card's Markdown, as GitHub and the Hub read it."""
    body = text.split("\n---\n", 1)[1]
    parsed = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    return parsed, [child for token in parsed for child in token.children or ()]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_stays_text_in_the_card(card, prompt):
    plain = [token.type for token in tokens(card("a plain prompt")[1])[0]]
    config, text = card(prompt)
    add_metrics(config.output_dir, {"likeness": 0.5})
    assert (config.output_dir / "README.md").read_text().count("\n## Evaluation\n") == 1
    header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    # PyYAML reads some rare line breaks back as plain ones
    assert header["instance_prompt"].split() == header["widget"][0]["text"].split()
    assert header["instance_prompt"].split() == prompt.split()
    assert header["tags"][0] == "text-to-image"
    blocks, inline = tokens(text)
    # the same blocks as with a plain prompt: no heading, list, row or HTML of its own
    assert [token.type for token in blocks] == plain
    allowed = {"text", "text_special", "code_inline", "image", "em_open", "em_close", "softbreak"}
    assert {token.type for token in inline} <= allowed
    assert [token.attrs["src"] for token in inline if token.type == "image"] == [
        "samples/final/grid.png"
    ]
    (code,) = re.findall(r"\n```python\n(.*?)\n```\n", text, re.DOTALL)
    compile(code, "card", "exec")


@pytest.mark.parametrize("name", ["<b>x", "a `b` [c](d)", "# x", "a_b_c"])
def test_the_name_of_a_run_stays_text_in_the_card(card, name):
    plain = [token.type for token in tokens(card("a plain prompt")[1])[0]]
    assert [token.type for token in tokens(card("a plain prompt", name)[1])[0]] == plain


@pytest.mark.parametrize("prompt", [prompt for prompt in HOSTILE if "<" in prompt])
def test_a_prompt_stays_text_in_the_reports(card, prompt):
    config, _ = card(prompt)
    folder = config.output_dir
    (folder / "config.yaml").write_text(dump_config(config))
    samples = folder / "samples" / "final"
    samples.mkdir(parents=True)
    shutil.copy(next(config.data.instance_data_dir.glob("*.png")), samples / "00-0.png")
    for pictures in (True, False):
        page = write_report(folder, pictures).read_text()
        assert page.count("<script>") == 1, "the report's own"
        assert "onerror=alert(1)>" not in page.replace("&gt;", "")
        assert prompt not in page


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_comes_back_from_the_header_and_the_public_config(card, prompt):
    config, _ = card(prompt)
    header = make_metadata(config, "stable-diffusion-v1")
    assert json.loads(header["diffusion_trainers.config"])["data"]["instance_prompt"] == prompt
    assert loading.parse_yaml(public_text(config))["data"]["instance_prompt"] == prompt


def test_trackers_are_not_told_of_the_machine(settings, monkeypatch):
    """wandb would send the host, the command line, the console and the state of the repository."""
    seen = {}

    def note(self, project, config=None, init_kwargs=None):
        seen.update(project=project, config=config, options=init_kwargs)

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", note)
    torch.manual_seed(0)
    run(settings("train.max_train_steps=1"))
    assert seen["config"] is None
    wandb = seen["options"]["wandb"]["settings"]
    assert (wandb["x_disable_meta"], wandb["disable_git"], wandb["console"]) == (True, True, "off")
