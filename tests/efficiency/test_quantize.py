"""A quantized base: what is kept small, that LoRA learns on it nearly as on the whole one, and what
is refused."""

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from tests.shared.runs import first_gradients, lora, run_steps
from trainers import dreambooth
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.run import run

LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}
EACH_WAY = (("sd15", "nf4"), ("flux", "int8"))
FP8 = ("model.quantization=fp8", "train.gradient_checkpointing=true")
CASES = [(family, how) for family in ("sd15", "sd3", "flux") for how in ("nf4", "int8")]
CASES += [("sd3", "fp8"), ("flux", "fp8")]
# each way to quantize, and each kind of denoiser; the others by hand
RUN_CASES = [
    pytest.param(*case, marks=() if case in EACH_WAY else pytest.mark.slow) for case in CASES
]


def quantised(settings, family, how, *overrides):
    return settings(
        *(FP8 if how == "fp8" else [f"model.quantization={how}"]), *overrides, family=family
    )


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_base_is_small_and_lora_is_float32(settings, family, how):
    task, _, _ = dreambooth.build(quantised(settings, family, how), Accelerator(cpu=True))
    names = {name for name, p in task.module.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert {p.dtype for p in trainable_parameters(task.module).values()} == {torch.float32}
    for name, layer in task.family.denoiser.named_modules():
        if "blocks." not in name or "lora_" in name or "norm" in name:
            continue
        if how == "fp8" and isinstance(layer, nn.Linear):
            assert layer.weight.dtype == torch.float8_e4m3fn, name
        elif isinstance(layer, nn.Linear):
            assert isinstance(layer, LAYERS[how]), name
            assert layer.weight.element_size() == 1, name


@pytest.mark.parametrize(("family", "how"), CASES)
def test_gradients_are_near_those_on_the_whole_base(settings, family, how):
    def gradients(config):
        return torch.cat([gradient.flatten() for gradient in first_gradients(config)[-1].values()])

    small, whole = gradients(quantised(settings, family, how)), gradients(settings(family=family))
    assert not torch.equal(small, whole)
    assert torch.cosine_similarity(small, whole, dim=0) > 0.95


@pytest.mark.parametrize(("family", "how"), RUN_CASES)
def test_a_run_samples_resumes_and_its_lora_loads_on_the_whole_base(
    settings, bases, family, how, tmp_path
):
    overrides = ("validation.prompts=[a b c]", "validation.validation_steps=2", "lora.alpha=5")
    one = quantised(settings, family, how, *overrides, f"output_dir={tmp_path}/one")
    two = quantised(settings, family, how, *overrides, f"output_dir={tmp_path}/two")
    run(one)
    run_steps(two, 3)
    run(two)
    assert all(torch.equal(lora(one)[name], lora(two)[name]) for name in lora(one))
    pipe = FAMILIES[family].pipeline.from_pretrained(bases[family])
    pipe.load_lora_weights(one.output_dir)
    loaded = getattr(pipe, FAMILIES[family].denoiser_name).state_dict()
    assert sum("lora_" in name for name in loaded) == len(lora(one))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "sd15",
            ("model.quantization=nf4", "lora=null"),
            "weights of a quantized base model cannot",
        ),
        ("flux", ("model.quantization=fp8",), "requires train.gradient_checkpointing"),
        ("sd15", FP8, "fp8 is for transformers"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(settings, family, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(*overrides, family=family)
