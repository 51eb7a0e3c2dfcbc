"""The modulation cache changes where weights are, and no bit of what is trained."""

import weakref

import pytest
from accelerate import Accelerator

from tests.shared.by_hand import by_hand_but
from tests.shared.oracles import assert_trained_alike
from tests.shared.processes import launch
from tests.shared.runs import CACHED, PRIOR, assert_same, lora, losses, run_steps
from trainers import dreambooth
from trainers.config import loading
from trainers.efficiency.modulation import CachedLinear
from trainers.errors import UserError
from trainers.run import run

VARIANTS = {
    "prior, accumulated": (
        *PRIOR,
        "train.gradient_accumulation_steps=2",
        "validation.prompts=[a b c]",
    ),
    "checkpointed, dropped": (
        "train.gradient_checkpointing=true",
        "data.caption_dropout=0.5",
        "train.ema_decay=0.5",
    ),
    "LoRA on some norms": (
        "lora.target_modules=[to_q, norm1.linear, norm_out.linear]",
        "lora.dropout=0.1",
    ),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """So that it is refilled in a run of six steps."""
    monkeypatch.setattr(dreambooth, "STEPS_PRECOMPUTED", 2)


@pytest.mark.parametrize("family", by_hand_but(["flux"], ["sd3", "flux"]))
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_the_training_is_equal_to_the_bit(settings, other_photos, tmp_path, family, overrides):
    shared = (
        *overrides,
        "validation.validation_steps=3",
        f"data.held_out_dir={other_photos}",
    )
    plain, cached = (
        settings(*shared, family=family),
        settings(*shared, CACHED, f"output_dir={tmp_path}/two", family=family),
    )
    run(plain)
    run_steps(cached, 3)
    run(cached)
    assert_same(plain, cached)
    for path in (plain.output_dir / "samples").rglob("*.png"):
        assert (
            path.read_bytes()
            == (
                tmp_path / "two/samples" / path.relative_to(plain.output_dir / "samples")
            ).read_bytes()
        )


@pytest.mark.parametrize(
    ("family", "fsdp"), [pytest.param("sd3", False, marks=pytest.mark.slow), ("flux", True)]
)
def test_two_processes_use_the_precomputed_outputs_of_their_own_rows(
    settings, tmp_path, family, fsdp
):
    whole = settings(*PRIOR, family=family)
    run(whole)
    parts = settings(
        *PRIOR, CACHED, "train.train_batch_size=1", f"output_dir={tmp_path}/two", family=family
    )
    (tmp_path / "two.yaml").write_text(loading.dump_config(parts))
    asked = {"ACCELERATE_USE_FSDP": str(fsdp), "FSDP_VERSION": "2"}
    assert launch(
        "train.py", tmp_path / "two.yaml", log=tmp_path / "log", processes=2, **asked
    ) == [0, 0]
    assert_trained_alike(
        (losses(whole), losses(parts)), (lora(whole), lora(parts)), whole.optimizer.learning_rate
    )


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_exactly_the_adaptive_norms_leave(settings, family):
    plain, cached = (
        dreambooth.build(settings(*more, family=family), Accelerator(cpu=True))[0].family
        for more in ((), (CACHED,))
    )
    sizes = {name: p.numel() for name, p in plain.denoiser.named_parameters()}
    gone = sizes.keys() - dict(cached.denoiser.named_parameters()).keys()
    assert gone == {name for name in sizes if "norm" in name and ".linear." in name}
    held = [
        layer.ring.cpu_weights[layer.number]
        for layer in cached.denoiser.modules()
        if isinstance(layer, CachedLinear)
    ]
    assert sum(tensor.numel() for away in held for tensor in away.values()) == sum(
        sizes[name] for name in gone
    )


def test_nothing_of_the_base_stays_when_it_is_released(settings):
    family = dreambooth.build(settings(CACHED, family="flux"), Accelerator(cpu=True))[0].family
    gone = weakref.ref(family.denoiser)
    family.unload()
    assert gone() is None


def test_micro_batches_of_half_precision_use_the_precomputed_outputs_of_autocast(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain, cached = (
        settings(family="flux"),
        settings(CACHED, f"output_dir={tmp_path}/two", family="flux"),
    )
    run(plain)
    run(cached)
    assert_same(plain, cached)


@pytest.mark.parametrize(
    "wrong",
    ["lora=null", "train.train_text_encoder=true", "model.quantization=nf4", "model.family=sd15"],
)
def test_it_is_refused_where_outputs_cannot_be_known_ahead(settings, wrong):
    with pytest.raises(UserError, match=r"model\.modulation_cache"):
        settings(CACHED, wrong, family="flux" if "sd15" not in wrong else "sd15")


def test_lora_on_the_time_embedding_is_refused(settings):
    with pytest.raises(UserError, match=r"model\.modulation_cache: .* time_text_embed"):
        run(settings(CACHED, "lora.target_modules=all-linear", family="flux"))
