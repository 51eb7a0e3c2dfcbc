"""Files that do not fit are refused, headers are as specified, and lower ranks are the nearest."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.shared.saved_loras import family_of, random_lora
from trainers.errors import UserError
from trainers.lora.files import read_lora
from trainers.lora.low_rank import lora_from_difference, reduce_rank
from trainers.lora.update import LoraUpdate, max_relative_difference
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


def test_a_file_for_another_model_is_an_error_that_says_so(made, bases):
    family = family_of(bases["sd15"], "sd15")
    text = r"\d+ of \d+ tensors are of layers that are not in this base.*names are of {}.*another"
    with pytest.raises(UserError, match=text.format("Flux.1")):
        read_lora(made["flux"][0] / WEIGHT_NAME, family)
    with pytest.raises(UserError, match=text.format("SD3.5")):
        read_lora(made["sd3"][0] / KOHYA_NAME, family)


def test_an_unfinished_run_has_no_lora_and_the_message_says_so(bases, tmp_path):
    with pytest.raises(
        UserError, match=r"there is no LoRA in it\. A run writes its LoRA when it finishes"
    ):
        read_lora(tmp_path, family_of(bases["sd15"], "sd15"))


# What the files tell of themselves


def test_the_headers_say_what_the_specifications_ask(made):
    for name, architecture in (("sd15", "stable-diffusion-v1"), ("flux", "flux-1-dev")):
        for file in (WEIGHT_NAME, KOHYA_NAME):
            with safe_open(made[name][0] / file, "pt") as opened:
                header = opened.metadata()
            assert header["modelspec.architecture"] == f"{architecture}/lora"
            assert header["modelspec.resolution"] == "16x16"
            config = json.loads(header["diffusion_trainers.config"])
            assert config["lora"]["rank"] == 2
            assert config["data"]["instance_prompt"] == "a b c"
            assert "torch" in json.loads(header["diffusion_trainers.versions"])


def test_kohyas_hash_is_of_the_tensors_alone(made):
    """Changing what the header says does not change it; changing a tensor does."""
    path = made["sd15"][0] / KOHYA_NAME
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    assert header["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "2"


# Ranks


def test_a_lower_rank_is_the_nearest_and_its_error_is_reported():
    lora = random_lora({"a": 12, "b": 7}, {"a": (9,), "b": (5, 3, 3)}, ranks=(6, 4))
    lora["b"] = LoraUpdate(
        lora["b"].a, lora["b"].b[..., None, None] if lora["b"].b.ndim == 2 else lora["b"].b
    )
    small, message = reduce_rank(lora, 2)
    lost = whole = 0
    for name, update in lora.items():
        product = update.delta_weight().numpy().astype(float)
        u, s, v = np.linalg.svd(product, full_matrices=False)
        np.testing.assert_allclose(
            small[name].delta_weight().numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5
        )
        assert small[name].rank == 2
        assert small[name].a.shape[1:] == update.a.shape[1:]
        lost += (s[2:] ** 2).sum()
        whole += (s**2).sum()
    assert message == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    same, nothing = reduce_rank(lora, 16)
    assert nothing == pytest.approx(0, abs=1e-12)
    assert max_relative_difference(lora, same) < 1e-5


def test_the_difference_of_two_models_is_what_was_added():
    rng = torch.Generator().manual_seed(0)
    base = {
        "linear": torch.randn(8, 6, generator=rng),
        "conv": torch.randn(8, 4, 3, 3, generator=rng),
    }
    base["same"] = torch.ones(2, 2)
    lora = random_lora({"linear": 8, "conv": 8}, {"linear": (6,), "conv": (4, 3, 3)}, ranks=(2,))
    tuned = {
        name: weight + lora[name].delta_weight().view_as(weight)
        for name, weight in base.items()
        if name in lora
    }
    found, message = lora_from_difference(base, base | tuned, 2)
    assert found.keys() == lora.keys()
    assert max_relative_difference(lora, found) < 1e-5
    assert message < 1e-5
    assert found["conv"].a.shape == (2, 4, 3, 3)
    assert found["conv"].b.shape == (8, 2, 1, 1)
    _, much = lora_from_difference(base, base | tuned, 1)
    assert 0.1 < much < 1
