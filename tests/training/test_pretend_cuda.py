"""Every trainer, family, precision and memory option runs whole on a pretended GPU."""

from importlib.util import find_spec

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.pretend_cuda import PretendCuda
from tests.shared.by_hand import by_hand_but
from tests.shared.families import FLOWS, UNETS
from tests.shared.language_models import READ_BY_LANGUAGE_MODELS
from tests.shared.pretended_runs import (
    LOG_EVERY,
    OPTIONS,
    PLAIN,
    SHOWN,
    SMALL,
    unexpected_waits,
)
from trainers.evaluate import EvaluationOptions, evaluate
from trainers.metrics.feature_networks import find_networks
from trainers.run import run

pytestmark = pytest.mark.usefixtures("measured_quickly")

# every family in every precision with every way to save memory; the default part has some of them
SAVING = {
    "plain": "",
    "checkpointed": "train.gradient_checkpointing=true",
    "selective": "train.gradient_checkpointing=selective",
    "offload": "model.offload=true train.gradient_checkpointing=true",
    "modulation-cache": "model.modulation_cache=true",
    "fp8": "model.quantization=fp8 train.gradient_checkpointing=true",
    "nf4": "model.quantization=nf4",
    "int8": "model.quantization=int8",
    "averaged": "train.ema_decay=0.9",
    "text-encoder": "train.train_text_encoder=true",
}
SLOW = {
    f"{family}-{precision}-{name}": options + " " + SHOWN
    for family in (*UNETS, *FLOWS, *READ_BY_LANGUAGE_MODELS)
    for precision in ("bf16", "fp16", "no")
    for name, options in SAVING.items()
    if not (family in UNETS and name in ("offload", "modulation-cache", "fp8"))
    and not (family in READ_BY_LANGUAGE_MODELS and name in ("modulation-cache", "text-encoder"))
}


# text encoders and several sizes; blocks away and a cache; pictures encoded at each step
OPTIONS_EACH_TIME = (
    "sdxl-bf16-text-encoders-buckets",
    "flux-bf16-all-saved",
    "sd15-bf16-without-cache",
)
SMALL_EACH_TIME = (
    "autoencoder-fp16-anomaly",
    "gan-no",
    "unet-bf16-segment",
    "unet-no-pix2pix",
)


def run_whole(settings):
    """Half of a run, and the rest from its checkpoint."""
    half = {"train": settings.train.model_copy(update={"max_train_steps": LOG_EVERY})}
    for part in (settings.model_copy(update=half), settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        run(part)


def check(gpu):
    assert gpu.memory.mixes == {}
    assert unexpected_waits(gpu.memory) == {}


@pytest.mark.parametrize("case", by_hand_but(["flux-no"], PLAIN))
def test_a_run_with_class_pictures_samples_and_measures(sources, case, nets):
    settings = sources.config(case, PLAIN[case])
    with PretendCuda() as gpu:
        run_whole(settings)
        networks = find_networks(*map(str, nets), torch.device("cuda"))
        options = EvaluationOptions(checkpoints=True, strengths=[1.0], num_images=1)
        result = evaluate(settings, settings.output_dir, networks, options)
    check(gpu)
    assert len(result["rows"]) > 1
    assert (settings.output_dir / "samples/final/grid.png").exists()


@pytest.mark.parametrize("case", by_hand_but(OPTIONS_EACH_TIME, OPTIONS))
def test_a_run_with_an_option(sources, case):
    if "prodigy" in case and not find_spec("prodigyopt"):
        pytest.skip("prodigyopt is not installed")
    with PretendCuda() as gpu:
        run_whole(sources.config(case, OPTIONS[case]))
    check(gpu)


@pytest.mark.parametrize("case", by_hand_but(SMALL_EACH_TIME, SMALL))
def test_a_run_of_a_small_network(sources, case):
    with PretendCuda() as gpu:
        run_whole(sources.config(case, SMALL[case]))
    check(gpu)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_a_run_of_any_family_in_any_precision(sources, case):
    with PretendCuda() as gpu:
        run_whole(sources.config(case, SLOW[case]))
    check(gpu)
