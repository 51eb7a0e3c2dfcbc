"""What DeepSpeed cannot do is refused before anything is loaded."""

import re

import pytest

from tests.shared.deepspeed_runs import networks
from trainers.distributed import deepspeed
from trainers.distributed.accelerator import make_accelerator
from trainers.errors import UserError

pytest.importorskip("deepspeed")
REFUSED = [
    ({}, ["optimizer.name=adafactor"], "optimizer.name=adamw"),
    ({}, ["train.auto_micro_batch=true"], "auto_micro_batch=false"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["train.ema_decay=0.9"], "remove train.ema_decay"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["model.quantization=nf4"], "cannot cut nf4"),
    (
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        ["model.modulation_cache=true"],
        "model.modulation_cache=false",
    ),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, [], "set zero_stage: 2 or 3"),
    ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, [], "offload_optimizer_device"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision: bf16 or no, not fp16"),
    (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        [],
        "gradient_accumulation_steps 4: only the config",
    ),
    ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, [], "gradient_clipping 0.5: only the config"),
    ({"ACCELERATE_USE_FSDP": "true"}, [], "choose one"),
    (
        {},
        ["data.class_prompt=c", "data.prior=output_preservation"],
        "data.prior=output_preservation has not been tried",
    ),
]


@pytest.fixture
def asked(monkeypatch):
    """A function: environment variables -> None. DeepSpeed was asked for in this process."""

    def ask(**environment):
        common = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "LOCAL_RANK": "0",
            "RANK": "0",
            "WORLD_SIZE": "1",
        }
        for name, value in (common | environment).items():
            monkeypatch.setenv(name, value)

    return ask


@pytest.mark.parametrize(
    ("environment", "overrides", "message"), REFUSED, ids=[message for *_, message in REFUSED]
)
def test_what_deepspeed_cannot_do_is_refused(settings, asked, environment, overrides, message):
    asked(**environment)
    with pytest.raises(UserError, match=re.escape(message)):
        make_accelerator(settings(*overrides, family="flux"))


def test_two_networks_and_small_ones_with_zero_3_are_refused(bars, asked, tmp_path):
    asked()
    with pytest.raises(UserError, match=r"here are two: use accelerate_configs/multi_gpu\.yaml"):
        make_accelerator(
            networks(bars, tmp_path, "gan", "data.resolution=32", "data.label_column=label")
        )
    asked(ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    with pytest.raises(
        UserError, match=r"this network is small: use accelerate_configs/deepspeed_zero2\.yaml"
    ):
        make_accelerator(networks(bars, tmp_path, "autoencoder"))


def test_deepspeed_that_did_not_start_is_reported(settings, launched):
    assert (
        "did not start: set use_cpu: false"
        in launched(settings(), 2, (2, 2), ACCELERATE_USE_CPU="true")[0]
    )


@pytest.mark.parametrize("lacking", ["package", "launcher"])
def test_without_the_package_or_a_launcher_the_message_says_what_to_do(
    settings, asked, monkeypatch, lacking
):
    asked()
    if lacking == "package":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(
        UserError, match="pip install deepspeed" if lacking == "package" else "accelerate launch"
    ):
        deepspeed.make_plugin(settings())
