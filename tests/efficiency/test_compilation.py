"""Compiled blocks train like plain ones, with few graphs, or are refused."""

import warnings
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from tests.shared.blocks import (
    CHECKPOINTED,
    COMPILED,
    DROPOUT,
    FAMILIES,
    SELECTIVE,
    assert_close,
    build,
    gradients,
)
from tests.shared.oracles import assert_trained_alike
from tests.shared.runs import lora, losses
from tests.shared.tiny_pipelines import make_flux, make_sd3
from trainers import dreambooth
from trainers.config import LoraConfig
from trainers.distributed.trained_weights import trainable_parameters
from trainers.efficiency import compilation
from trainers.errors import UserError
from trainers.lora.layers import add_adapter
from trainers.run import run
from trainers.run_folder import list_checkpoints


@pytest.fixture
def traced(monkeypatch):
    """Compiled blocks are traced, differentiated and partitioned as ever; only no C++ is written
    from that."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")
    )


def compare(settings, family, more):
    plain = gradients(*build(settings(*more, family=family)))
    with inductor.patch(fallback_random=True):  # which draws as plain PyTorch does
        assert_close(plain, gradients(*build(settings(*more, COMPILED, family=family))))
    assert counters["stats"]["unique_graphs"] > 1


@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("sd3", ("train.gradient_accumulation_steps=2",), marks=pytest.mark.slow),
        ("sd3", (DROPOUT, CHECKPOINTED)),
        ("flux", ("model.modulation_cache=true", "train.gradient_accumulation_steps=2", DROPOUT)),
    ],
)
def test_compiled_blocks_give_the_gradients_of_plain_ones(settings, traced, family, more):
    compare(settings, family, more)


def dropped_alike(settings, *more):
    """The gradient is the slope of the loss, which it would not be if the backward pass dropped
    other values."""
    task, _ = build(settings(DROPOUT, COMPILED, *more, family="sd3"))
    found = gradients(task, task.batches(0))
    norm = torch.stack([value.norm() for name, value in found.items() if name != "loss"]).norm()
    ends = []
    for move in (0.01, -0.02):
        for name, parameter in trainable_parameters(task.module).items():
            parameter.data += move * found[name] / norm
        ends.append(gradients(task, task.batches(0))["loss"])
    torch.testing.assert_close((ends[0] - ends[1]) / 0.02, norm, rtol=0.02, atol=0)


def test_the_backward_pass_drops_what_the_forward_pass_dropped(settings, traced):
    dropped_alike(settings, CHECKPOINTED)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize(
    "more",
    [("train.gradient_accumulation_steps=2",), (DROPOUT,), (CHECKPOINTED,), (DROPOUT, SELECTIVE)],
)
def test_what_inductor_makes_of_them_does_too(settings, family, more):
    torch._dynamo.reset()
    counters.clear()
    compare(settings, family, more)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (CHECKPOINTED,)])
def test_inductor_drops_alike_too(settings, more):
    torch._dynamo.reset()
    dropped_alike(settings, *more)


@pytest.mark.slow
def test_four_graphs_are_enough_for_any_depth(monkeypatch):
    """Flux.1: the first block, whose input has no gradient, then the others; of the single blocks
    the first, which sees other strides. SD3.5: the first, those with two attentions, the others,
    the last, which drops the text."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flux, sd3 = dict(make_flux().transformer.config), dict(make_sd3().transformer.config)
    flux |= {"num_layers": 3, "num_single_layers": 3}
    sd3 |= {"num_layers": 6, "dual_attention_layers": (0, 1, 2)}
    text = {"encoder_hidden_states": torch.randn(1, 8, 32), "timestep": torch.ones(1)}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3), "guidance": torch.ones(1)}
    inputs = {
        FluxTransformer2DModel: (flux, {"hidden_states": torch.randn(1, 16, 16), **ids}, 16),
        SD3Transformer2DModel: (sd3, {"hidden_states": torch.randn(1, 4, 8, 8)}, 24),
    }
    for kind, (shape, given, width) in inputs.items():
        model = kind.from_config(shape).train()
        add_adapter(model, LoraConfig(rank=2, target_modules=["to_q"]))
        compilation.compile_blocks(model)
        counters.clear()
        for _ in range(2):
            model(**given, **text, pooled_projections=torch.randn(1, width))[0].sum().backward()
        assert counters["stats"]["unique_graphs"] == 4


def test_a_compiled_run_writes_the_same_files_and_compiles_nothing_for_pictures(
    settings, other_photos, traced, tmp_path
):
    shared = (
        *("validation.prompts=[a b c]", "validation.validation_steps=3", "optimizer.eps=1e-3"),
        f"data.held_out_dir={other_photos}",
    )
    plain, fast = (
        settings(*shared, *more, family="flux")
        for more in ((), (COMPILED, f"output_dir={tmp_path}/two"))
    )
    run(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "train.compile")
        run(fast)
    assert counters["stats"]["unique_graphs"] == 3  # two resolutions, and the first block
    assert_trained_alike(
        (losses(plain), losses(fast)), (lora(plain), lora(fast)), plain.optimizer.learning_rate
    )
    states = [
        load_file(list_checkpoints(s.output_dir / "checkpoints")[0] / "denoiser.safetensors")
        for s in (plain, fast)
    ]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)
    pictures = {
        path.relative_to(plain.output_dir) for path in plain.output_dir.rglob("samples/**/*.png")
    }
    assert pictures == {
        path.relative_to(fast.output_dir) for path in fast.output_dir.rglob("samples/**/*.png")
    }


def test_without_a_compiler_there_is_one_message_and_the_plain_training(
    settings, monkeypatch, tmp_path
):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain, fast = (
        settings(*more, family="flux") for more in ((), (COMPILED, f"output_dir={tmp_path}/two"))
    )
    run(plain)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        run(fast)
    (message,) = [
        str(warning.message) for warning in caught if "train.compile" in str(warning.message)
    ]
    assert "compiler" in message
    assert message.endswith("training goes on without")
    assert losses(plain) == losses(fast)
    assert all(torch.equal(tensor, lora(fast)[name]) for name, tensor in lora(plain).items())


@pytest.mark.parametrize(
    "wrong",
    [
        "model.quantization=nf4",
        "lora.use_dora=true",
        "model.offload=true",
    ],
)
def test_compiling_is_refused_with_what_it_cannot_be_combined_with(settings, wrong):
    with pytest.raises(UserError, match=r"train\.compile: cannot be combined with"):
        settings(COMPILED, wrong, family="flux")


def test_a_u_net_is_not_compiled(settings):
    with pytest.raises(UserError, match=r"train\.compile: gave SD1\.5 wrong gradients"):
        settings(COMPILED)


def test_a_sharded_base_is_not_compiled(settings):
    with pytest.raises(UserError, match=r"train\.compile: .* FSDP2"):
        dreambooth.build(
            settings(COMPILED, family="flux"), Accelerator(cpu=True), shard=lambda model: None
        )
