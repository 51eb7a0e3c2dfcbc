"""The model card is valid metadata and runnable code; only what should be shared is; a failed upload loses nothing."""

import re
import shlex
from itertools import pairwise

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from trainers import UserError, hub

HUB_NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NASTY = "a \"b\": 'c' # é, - [x]"


@pytest.fixture
def card(settings):
    """A function: overrides -> the text of that run's card."""

    def write(*overrides):
        config = settings(*overrides)
        config = config.model_copy(update={"data": config.data.model_copy(update={"instance_prompt": NASTY})})
        config.output_dir.mkdir(exist_ok=True)
        hub.write_card(config, 1e-7, 5)
        return (config.output_dir / "README.md").read_text()

    return write


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora.target_modules=[to_q, to_k]", "lora=null"])
def test_the_header_is_valid_metadata(card, lora):
    text = card(lora, f"model.pretrained_model_name_or_path={HUB_NAME}", "validation.prompts=[a b, c d]")
    header, data = yaml.safe_load(text.split("---")[1]), ModelCard(text).data
    assert data.to_dict() == header  # nothing was dropped as unknown or malformed
    assert (data.base_model, data.library_name, data.pipeline_tag) == (HUB_NAME, "diffusers", "text-to-image")
    assert header["base_model_relation"] == ("finetune" if lora == "lora=null" else "adapter")
    assert ("lora" in data.tags) == (lora != "lora=null")
    assert header["instance_prompt"] == NASTY


def test_a_local_base_is_not_published_as_a_hub_name(card):
    assert ModelCard(card()).data.base_model is None


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_the_example_is_python_that_asks_for_the_prompt(card, lora):
    (code,) = re.findall(r"```python\n(.*?)```", card(lora), re.DOTALL)
    compile(code, "card", "exec")
    assert repr(NASTY) in code
    assert ("load_lora_weights" in code) == (lora != "lora=null")


def test_weights_card_config_and_shown_samples_are_shared_and_nothing_else(card):
    header = yaml.safe_load(card("validation.prompts=[a b, c d]").split("---")[1])
    shown = [entry["output"]["url"] for entry in header["widget"]]
    public = ["README.md", "config.yaml", "pytorch_lora_weights.safetensors", "samples/final/grid.png", *shown]
    public += ["pipeline/model_index.json", "pipeline/unet/diffusion_pytorch_model.safetensors"]
    private = ["checkpoints/step-000002/denoiser.safetensors", "cache/ab/abcd.safetensors", "metrics.jsonl"]
    private += ["class_images/class-00000.png", "samples/step-000002/00-0.png", "tracking/events"]
    assert list(filter_repo_objects(public + private, allow_patterns=hub.SHARED)) == public


@pytest.mark.parametrize("private", [False, True])
def test_a_failed_upload_tells_how_to_try_again_and_leaves_the_run_whole(settings, tmp_path, monkeypatch, private):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "README.md").write_text("card")
    config = settings("hub.push_to_hub=true", "hub.hub_model_id=me/mine", f"hub.private={private}")
    config = config.model_copy(update={"output_dir": folder})
    with pytest.raises(UserError, match="upload to me/mine failed") as caught:
        hub.push(config)
    again = shlex.split(str(caught.value).splitlines()[-1])
    assert again[:5] == ["hf", "upload", "me/mine", str(folder), "."]
    assert [word for flag, word in pairwise(again) if flag == "--include"] == hub.SHARED
    assert ("--private" in again) == private
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("README.md", "card")]


def test_a_run_to_be_pushed_needs_a_login_before_it_starts(settings, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.check_login(settings())
    with pytest.raises(UserError, match="hf auth login"):
        hub.check_login(settings("hub.push_to_hub=true"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub.check_login(settings("hub.push_to_hub=true"))
