"""PEFT's configs in the headers of files and in folders from elsewhere."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from tests.shared.lora_files import QUERY, pair
from trainers.errors import UserError
from trainers.lora.files import read_lora


def adapter_config(**values):
    flat = {f"unet.{key}": value for key, value in values.items()}
    return {"lora_adapter_metadata": json.dumps(flat)}


@pytest.mark.parametrize(
    ("metadata", "meaning"),
    [
        ({"lora_adapter_metadata": "{"}, "is not JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "is not JSON"),
        ({"lora_adapter_metadata": "[]"}, "is not a JSON object"),
        (adapter_config(lora_alpha="4"), "lora_alpha is 4, not a number"),
        (adapter_config(lora_alpha=math.nan), "lora_alpha is nan"),
        (adapter_config(lora_alpha=True), "lora_alpha is True"),
        (adapter_config(lora_alpha=10**300), "not a number of usual size"),
        (adapter_config(use_rslora="no"), "use_rslora is 'no'"),
        (adapter_config(alpha_pattern=["to_q"]), "alpha_pattern is not a table"),
        (adapter_config(alpha_pattern={"to_q": None}), "alpha_pattern of 'to_q' is None"),
        (adapter_config(alpha_pattern={"(a+)+$": 1}), "not regular expressions"),
        (adapter_config(alpha_pattern={"a" * 1000: 1}), "not regular expressions"),
        (adapter_config(peft_type="LOKR"), "peft_type is 'LOKR'"),
        (adapter_config(init_lora_weights="pissa_niter_4"), "changes the base as well"),
        (adapter_config(modules_to_save=["conv_in"]), "modules_to_save cannot be read"),
    ],
)
def test_configs_with_other_values_than_peft_writes_are_refused(refused, metadata, meaning):
    assert meaning in refused(pair(), metadata)


def test_a_pattern_that_would_run_for_ever_is_not_run(refused):
    evil = {"(" * 20 + "a" + "*)" * 20 + "*b": 1}
    assert "not regular expressions" in refused(pair(), adapter_config(alpha_pattern=evil))


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ({"to_q": 4}, 2),
        ({"attn1.to_q": 4}, 2),
        ({r"attn1\.to_q": 4}, 2),
        ({QUERY.removeprefix("unet."): 4}, 2),
        ({"^" + QUERY.removeprefix("unet."): 4}, 2),
        ({"^to_q": 4, "o_q": 4, "to_k": 4}, 3),
    ],
)
def test_alpha_patterns_are_ends_of_names_or_after_a_caret_whole_ones(
    family, tmp_path, pattern, scale
):
    """PEFT's rule for keys that are no regular expressions: rank 2, and an alpha of 6 elsewhere."""
    metadata = adapter_config(r=2, lora_alpha=6, alpha_pattern=pattern)
    save_file(pair(), tmp_path / "file.safetensors", metadata)
    (update,) = read_lora(tmp_path / "file.safetensors", family).values()
    assert torch.equal(update.delta_weight(), torch.full((8, 8), 2.0 * scale))


# PEFT's folders


def adapter_folder(folder, config='{"r": 2, "lora_alpha": 2}', tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config)
    state = pair("base_model.model." + QUERY.removeprefix("unet.")) if tensors is None else tensors
    if state:
        save_file(state, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ({"config": "{"}, "is not JSON"),
        ({"config": '{"peft_type": "IA3"}'}, "peft_type is 'IA3'"),
        ({"tensors": {}}, "there is no such file"),
        ({"tensors": pair("base_model.model.nowhere")}, "2 of 2 tensors"),
    ],
)
def test_a_folder_of_peft_is_checked_like_a_file(family, tmp_path, arguments, meaning):
    with pytest.raises(UserError, match=meaning):
        read_lora(adapter_folder(tmp_path, **arguments), family)


def test_a_pickle_in_a_folder_of_peft_is_named(family, tmp_path):
    folder = adapter_folder(tmp_path, tensors={})
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="PyTorch file"):
        read_lora(folder, family)


def test_two_adapters_of_one_component_are_refused(family, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        adapter_folder(tmp_path / name / "unet")
    with pytest.raises(UserError, match="two adapters for unet"):
        read_lora(tmp_path, family)


def test_the_file_in_a_folder_of_peft_takes_its_alpha_from_the_config_beside_it(family, tmp_path):
    folder = adapter_folder(tmp_path / "adapter", '{"r": 2, "lora_alpha": 6}')
    file = folder / "adapter_model.safetensors"
    for path in (folder, file):
        (update,) = read_lora(path, family).values()
        assert torch.equal(update.delta_weight(), torch.full((8, 8), 6.0))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="without which their strength is not known"):
        read_lora(file, family)
