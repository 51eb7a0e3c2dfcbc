"""The model card is valid metadata and runnable code, whatever text the user gives."""

import json
import re
from importlib.metadata import PackageNotFoundError

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.shared.families import UNETS
from tests.shared.pictures import PICTURE
from trainers.lora.export import make_metadata
from trainers.publishing import hub as publishing_hub
from trainers.publishing.markdown import escape_markdown, unescape_markdown
from trainers.publishing.model_card import add_metrics, write_dreambooth_card

HUB_NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NASTY = "a \"b\": 'c' # é, - [x]"


@pytest.fixture
def card(settings):
    """A function: overrides -> the text of that run's card."""

    def write(*overrides):
        config = settings(*overrides)
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"instance_prompt": NASTY})}
        )
        config.output_dir.mkdir(exist_ok=True)
        write_dreambooth_card(config, 4, 1e-7, [PICTURE] * 5)
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
    versions = json.loads(make_metadata(settings(), "any")["diffusion_trainers.versions"])
    assert versions["diffusion-trainers"] == "not installed"


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
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", {"license": "openrail++"}),
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
def test_the_bases_license_is_inherited_and_the_card_names_the_file_for_comfyui(
    settings, family, base, license
):
    config = settings(f"model.pretrained_model_name_or_path={base}", family=family)
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
    text = (config.output_dir / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert license.items() <= header.items()
    assert ("license" in header) == bool(license)
    assert header.get("license") != "other" or base in header["license_link"]
    kohya = "pytorch_lora_weights_kohya.safetensors"
    file = kohya if family in UNETS else "pytorch_lora_weights.safetensors"
    assert f"put `{file}` into" in text


def test_figures_measured_later_stand_in_the_card_once(settings):
    config = settings()
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
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
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
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


def test_the_pictures_of_the_card_are_shared(card, settings):
    header = yaml.safe_load(card("validation.prompts=[a b, c d]").split("---")[1])
    folder = settings().output_dir
    shown = ["samples/final/grid.png", *(entry["output"]["url"] for entry in header["widget"])]
    for name in shown:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert set(shown) < set(publishing_hub.files_to_upload(folder))
