"""Runs of each kind of adapter: stopped and resumed they end the same, and their files reload."""

import re
import sys

import export as script
import pytest
import torch
from safetensors.torch import load_file

from tests.shared.runs import assert_same, run_steps
from tests.shared.saved_loras import family_of
from trainers.efficiency.apply import open_family
from trainers.lora.base_layers import loaded_weights
from trainers.lora.files import load_lora, read_lora
from trainers.lora.sampler import LoraSampler
from trainers.memory_plan import plan_memory
from trainers.run import run
from trainers.run_folder import CARD_NAME, WEIGHT_NAME
from trainers.training.run_weights import find_run_weights

PROMPT = "validation.prompts=[{prompt: a b c, lora_scale: 0.5}]"
RUNS = {
    "patterns": ("sd3", "lora.rank_pattern={to_q: 3}", "lora.alpha_pattern={to_k: 5}"),
    "LoRA+": ("sd15", "optimizer.lora_plus_ratio=4", "train.train_text_encoder=true"),
    "PiSSA": ("flux", "lora.init_lora_weights=pissa", "train.ema_decay=0.5"),
    "OLoRA": ("sd15", "lora.init_lora_weights=olora", "train.train_text_encoder=true"),
    "LoKr": ("flux", "lora.type=lokr", "lora.alpha=1", "train.gradient_checkpointing=true"),
    "LoHa": ("sd15", "lora.type=loha", "train.train_text_encoder=true", "train.ema_decay=0.5"),
    "convolutions": ("sd15", "lora.target_modules=attention+mlp+conv", "lora.type=lokr"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [(o[0], o[1:]) for o in RUNS.values()], ids=RUNS)
def test_a_stopped_run_ends_as_an_undisturbed_one_and_its_file_reloads(
    settings, bases, tmp_path, monkeypatch, family, options
):
    one, other = (
        settings(PROMPT, *options, f"output_dir={tmp_path}/{name}", family=family)
        for name in ("one", "other")
    )
    run(one)
    run_steps(other, 3)
    run(other)
    assert_same(one, other)
    assert plan_memory(one, torch.float32, has_cpu_memory=True).peak_bytes > 0
    card = (one.output_dir / CARD_NAME).read_text()
    assert float(re.search(r"differs by (\S+) \(relative", card)[1]) < 1e-5
    assert one.lora.title in card
    # as scripts/generate.py and scripts/evaluate.py load it, and as a whole pipeline
    family = family_of(bases[family], family)
    lora = read_lora(one.output_dir / WEIGHT_NAME, family)
    family.load(family.denoiser_name, *family.clip_encoders)
    plain = {key: weight.clone() for key, weight in loaded_weights(family).items()}
    load_lora(family, one.output_dir / WEIGHT_NAME)
    weights = find_run_weights(str(one.output_dir), "dreambooth")
    sampler = LoraSampler(weights, ["a b c"], tmp_path / "exported")
    rows = {"row": [("a b c", 1)]}
    pictures = [
        sampler(name, rows, tmp_path / f"pictures-{name}")["row"] for name in ("base", sampler.name)
    ]
    assert not torch.equal(*pictures)
    arguments = ["export.py", str(one.output_dir), "--format", "merged"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "merged")])
    script.main()
    model = one.model.model_copy(
        update={"pretrained_model_name_or_path": str(tmp_path / "merged"), "variant": None}
    )
    merged = open_family(model)
    merged.load(merged.denoiser_name, *merged.clip_encoders)
    found = loaded_weights(merged)
    for key, weight in plain.items():
        wanted = lora[key].apply_to(weight).float() if key in lora else weight
        torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=1e-5)
    assert load_file(one.output_dir / WEIGHT_NAME)
