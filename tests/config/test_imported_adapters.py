"""Other trainers' LoRA, LoKr and LoHa, their factors, convolutions and rates become ours."""

import json

import pytest

from trainers.config import loading
from trainers.config.importers import ai_toolkit, import_config, kohya, onetrainer, simpletuner

CONV = "conv|conv1|conv2"
KOHYA = {"network_dim": 16, "network_alpha": 8, "network_train_unet_only": True}


def with_args(module, *args, **more):
    return kohya.read(KOHYA | {"network_module": module, "network_args": list(args)} | more)


def job(network, arch="sd1"):
    process = {"model": {"arch": arch}, "network": network, "datasets": [{"folder_path": "/a"}]}
    return ai_toolkit.read({"job": "extension", "config": {"name": "a", "process": [process]}})


def tuner(lycoris):
    tree = {"lora_type": "lycoris", "lycoris_config": lycoris, "model_family": "flux"}
    return simpletuner.read(tree | {"lora_rank": 64})


CASES = {
    "kohya LoKr": (
        with_args("lycoris.kohya", "algo=lokr", "factor=8", "decompose_both=True", sdxl=True),
        {
            "model.family": "sdxl",
            "lora.type": "lokr",
            "lora.rank": 16,
            "lora.alpha": 8,
            "lora.decompose_factor": 8,
            "lora.decompose_both": True,
            "lora.target_modules": "attention+mlp+conv",
        },
        set(),
    ),
    "kohya LoKr of whole factors": (
        with_args("lycoris.kohya", "algo=lokr", "full_matrix=True", "preset=attn-mlp"),
        {"lora.rank": 4096, "lora.alpha": None, "lora.target_modules": "attention+mlp"},
        set(),
    ),
    "kohya LoHa with its own convolutions": (
        with_args("lycoris.kohya", "algo=loha", "conv_dim=4", "conv_alpha=1", "use_tucker=True"),
        {
            "lora.type": "loha",
            "lora.rank_pattern": {CONV: 4},
            "lora.alpha_pattern": {CONV: 1.0},
        },
        {"network_args.use_tucker"},
    ),
    "kohya LoCon": (
        with_args("networks.lora", "conv_dim=16", "loraplus_unet_lr_ratio=16"),
        {
            "lora.type": None,
            "lora.target_modules": "attention+mlp+conv",
            "lora.rank_pattern": None,
            "lora.alpha_pattern": {CONV: 1.0},
            "optimizer.lora_plus_ratio": 16,
        },
        set(),
    ),
    "kohya's own LoKr": (
        with_args("networks.lokr", "factor=4", network_dropout=0.1),
        {"lora.type": "lokr", "lora.decompose_factor": 4, "lora.dropout": None},
        set(),
    ),
    "kohya of another kind": (
        with_args("lycoris.kohya", "algo=boft"),
        {"lora.type": None},
        {"network_args.algo"},
    ),
    "ai-toolkit LoKr": (
        job({"type": "lokr", "lokr_full_rank": True, "lokr_factor": 8, "linear": 4}, "flux"),
        {"lora.type": "lokr", "lora.rank": 4096, "lora.alpha": None, "lora.decompose_factor": 8},
        set(),
    ),
    "ai-toolkit convolutions": (
        job({"type": "lora", "linear": 16, "linear_alpha": 16, "conv": 8, "conv_alpha": 4}),
        {
            "lora.target_modules": "attention+mlp+conv",
            "lora.rank_pattern": {CONV: 8},
            "lora.alpha_pattern": {CONV: 4.0},
        },
        set(),
    ),
    "SimpleTuner": (
        tuner(
            {
                "algo": "lokr",
                "multiplier": 1.0,
                "linear_dim": 10000,
                "linear_alpha": 1,
                "factor": 16,
                "apply_preset": {"target_module": ["Attention", "FeedForward"]},
            }
        ),
        {
            "lora.type": "lokr",
            "lora.rank": 4096,
            "lora.alpha": None,
            "lora.decompose_factor": 16,
            "lora.target_modules": "attention+mlp",
        },
        set(),
    ),
    "OneTrainer": (
        onetrainer.read({"model_type": "FLUX_DEV_1", "peft_type": "LOHA", "lora_rank": 4}),
        {"lora.type": "loha", "lora.rank": 4},
        set(),
    ),
}


@pytest.mark.parametrize(("imported", "expected", "left"), CASES.values(), ids=CASES)
def test_the_adapter_becomes_ours(imported, expected, left):
    assert {path: imported.value(path) for path in expected} == expected
    assert set(imported.leftovers()) == left
    _, mistakes = loading.validate(imported.tree(), needs_pictures=False)
    assert not [line for line in mistakes if line.startswith(("lora", "optimizer"))]


def test_a_lycoris_file_is_read_where_it_lies_beside_the_config(tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "lycoris_config.json").write_text(json.dumps({"algo": "loha", "linear_dim": 8}))
    tree = {"--model_family": "flux", "--model_type": "lora", "--lora_type": "lycoris"}
    for name, left in (("config/lycoris_config.json", []), ("elsewhere.json", ["lycoris_config"])):
        file = folder / "config.json"
        file.write_text(json.dumps(tree | {"--lycoris_config": name}))
        imported = import_config(file)
        assert list(imported.leftovers()) == left
        assert imported.value("lora.type") == (None if left else "loha")
