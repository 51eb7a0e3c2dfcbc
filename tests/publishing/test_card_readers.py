"""The card tells for each program what it reads of the file, and a pushed one where it lies."""

import pytest

from tests.shared.pictures import PICTURE
from trainers.publishing.model_card import name_repository, write_dreambooth_card
from trainers.publishing.readers import lora_readers

KOHYA = "pytorch_lora_weights_kohya.safetensors"


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("sd15", [], f"put `{KOHYA}` into"),
        ("sd15", ["lora.kohya=false"], "--format kohya"),
        ("sd15", ["lora.use_dora=true"], "--format merged"),
        ("flux", [], "put `pytorch_lora_weights.safetensors` into"),
        ("flux", ["lora.kohya=true"], f"put `{KOHYA}` into"),
        ("flux", ["lora.use_dora=true"], "leave out the magnitudes of DoRA"),
        ("sd15", ["lora.type=lokr"], "put `pytorch_lora_weights.safetensors` into"),
        ("flux", ["lora.type=loha"], "put `pytorch_lora_weights.safetensors` into"),
        ("flux", ["lora=null"], ""),
    ],
)
def test_the_card_names_a_file_for_comfyui_only_where_it_reads_one(
    settings, family, options, expected
):
    config = settings(*options, family=family)
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
    text = (config.output_dir / "README.md").read_text()
    assert expected in lora_readers(config)
    assert lora_readers(config) in text
    assert ("into `models/loras`" in text) == expected.startswith("put")


def test_the_code_of_a_card_loads_what_diffusers_does_not_by_peft(settings):
    config = settings("lora.type=lokr", "train.train_text_encoder=true")
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
    text = (config.output_dir / "README.md").read_text()
    assert "pipe.load_lora_weights(" not in text
    for part in ("unet", "text_encoder"):
        assert f'PeftModel.from_pretrained(pipe.{part}, "FOLDER/{part}")' in text
    assert "| Trained | LoKr of rank 2 (attention), with the text encoder |" in text


def test_a_card_names_its_repository_and_after_another_push_the_other(settings):
    config = settings('data.instance_prompt=pipe.load_lora_weights("x")')
    config.output_dir.mkdir()
    write_dreambooth_card(config, 4, 1e-7, [PICTURE])
    card = config.output_dir / "README.md"
    before = card.read_text()
    for repo in ("me/mine", "you/yours"):
        name_repository(config.output_dir, repo)
        line = '\npipe.load_lora_weights("{}")\n'
        expected = before.replace(line.format("PATH_OR_REPO"), line.format(repo))
        assert card.read_text() == expected != before


def test_the_card_of_a_model_from_scratch_names_its_repository(tmp_path):
    line = 'model = UNet.from_pretrained("PATH_OR_REPO", subfolder="model")'
    (tmp_path / "README.md").write_text(f"```python\n{line}\n```\n")
    name_repository(tmp_path, "me/mine")
    assert 'from_pretrained("me/mine", subfolder="model")' in (tmp_path / "README.md").read_text()
