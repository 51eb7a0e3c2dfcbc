"""The benchmark's gate passes the honest step of each family and refuses one with a known fault."""

import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.shared.processes import ROOT, call
from trainers.families import base as family_module
from trainers.families.flux import Flux
from trainers.families.sd3 import SD3
from trainers.families.sd15 import SD15
from trainers.lora.lora_linear import LoraLinear

sys.path.insert(0, str(ROOT / "scripts"))

from benchmark import parity
from benchmark.in_memory import Place, gate
from benchmark.sizes import SIZES

FAMILIES = {"sd15": SD15, "sd3": SD3, "flux": Flux}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def check(family, precision, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    return gate(family, SIZES[family]["tiny"], Place(torch.device("cpu"), precision, folder))


def lose_scale(family, patch):
    forward = LoraLinear.forward

    def without(self, x):
        self.scaling = dict.fromkeys(self.scaling, 1.0)
        return forward(self, x)

    patch.setattr(LoraLinear, "forward", without)


def lose_shift(family, patch):
    patch.setattr(family_module, "resolution_shift", lambda scheduler, tokens: 1.0)


def scale_time(factor):
    """The denoiser is told another unit of time."""

    def fault(family, patch):
        predict = FAMILIES[family].predict

        def told(self, denoiser, x_t, t, condition):
            return predict(self, denoiser, x_t, factor * t, condition)

        patch.setattr(FAMILIES[family], "predict", told)

    return fault


FAULTS = {
    "lost LoRA scale": (lose_scale, ("sd15", "sd3", "flux")),
    "lost flow shift": (lose_shift, ("sd3", "flux")),
    "times divided by 1000 once more": (scale_time(1 / 1000), ("sd15", "sd3", "flux")),
    "times not divided by 1000": (scale_time(1000), ("sd3", "flux")),
}
CASES = [(name, family) for name, (_, families) in FAULTS.items() for family in families]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_honest_step_passes(family, precision, folder):
    """In float16 with autocast and the GradScaler of a GPU."""
    found = check(family, precision, folder)
    assert found["equal"], found
    assert ("ours_from_float32" in found) == (precision != "no")


def test_a_lost_scale_of_the_loss_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: loss)
    assert not check("flux", "fp16", folder)["equal"]


@pytest.mark.parametrize(("fault", "family"), CASES)
def test_a_faulty_step_is_refused(fault, family, folder, monkeypatch):
    FAULTS[fault][0](family, monkeypatch)
    # in bfloat16, where the bounds are widest
    found = check(family, "bf16", folder)
    assert not found["equal"], found


def outcome(loss, gradient):
    return parity.Outcome(loss, torch.tensor(gradient, dtype=torch.float64))


def test_ours_may_be_half_as_far_again_from_float32_as_the_reference_and_no_farther():
    exact = [outcome(1.0, [1.0, 0.0])]
    theirs = [outcome(1.01, [1.0, 0.01])]
    bounds = dict.fromkeys(parity.BOUNDS, parity.Bounds(1e-2, 1e-2, 0.999))
    for loss, tilt, expected in (
        (1.0149, 0.0, True),
        (1.0151, 0.0, False),
        (1.0, -0.0149, True),
        (1.0, -0.0151, False),
    ):
        ours = [outcome(loss, [1.0, tilt])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "BOUNDS", bounds)
            assert parity.judge(ours, theirs, exact, "bf16")["equal"] == expected, (loss, tilt)


def test_float16_in_processes_on_a_cpu_is_refused_in_a_sentence(capsys):
    assert call("benchmark", "--precision=fp16", "--device=cpu") == 2
    assert "accelerate leaves out autocast and GradScaler" in capsys.readouterr().err
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    assert accelerator.scaler is None
    assert not accelerator.native_amp
