"""How blocks run changes time and memory, and nothing that is trained beyond rounding."""

import gc
import inspect
import warnings
from functools import partial
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from conftest import make_flux, make_sd3
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from oracles import assert_trained_alike
from safetensors.torch import load_file
from test_training import PRIOR, lora, losses
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trainers import dreambooth
from trainers.config import LoraConfig
from trainers.distributed.trained_weights import trainable_parameters
from trainers.efficiency import attention, compilation
from trainers.errors import UserError
from trainers.lora.layers import add_adapter
from trainers.memory_plan import MemoryMeter
from trainers.run import run
from trainers.run_folder import list_checkpoints

FAMILIES = ("sd15", "sd3", "flux")
DROPOUT, CHECKPOINTED = "lora.dropout=0.3", "train.gradient_checkpointing=true"
SELECTIVE, COMPILED = "train.gradient_checkpointing=selective", "train.compile=true"


def build(settings):
    """A task with B not at its zero start, its first batches, and the gradients of all of them with
    their losses."""
    task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(task.module).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task.module.train() and task, list(batches(0))


def gradients(task, batches):
    total = 0
    for batch, rng in batches:
        torch.manual_seed(7)
        ((_, loss),) = task.losses(batch, rng)
        loss.backward()
        total += loss.detach()
    found = {name: p.grad for name, p in trainable_parameters(task.module).items()}
    task.module.zero_grad()
    return {"loss": total, **found}


@pytest.fixture
def traced(monkeypatch):
    """Compiled blocks are traced, differentiated and partitioned as ever; only no C++ is written
    from that."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")
    )


# Selective checkpointing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [(), (DROPOUT,), ("lora.target_modules=attention+mlp", *PRIOR)])
def test_recomputing_changes_no_bit(settings, family, more):
    plain = gradients(*build(settings(*more, family=family)))
    for kind in (CHECKPOINTED, SELECTIVE):
        again = gradients(*build(settings(kind, *more, family=family)))
        assert plain.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in plain.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_keeps_less_than_all_and_recomputes_less_than_everything(settings, family):
    kept, flops = {}, {}
    for kind in ("false", "selective", "true"):
        shape = ("data.resolution=32", "train.train_batch_size=8")
        chosen = settings(f"train.gradient_checkpointing={kind}", *shape, family=family)
        task, ((batch, rng),) = build(chosen)
        with MemoryMeter() as meter:
            for tensor in (*task.module.parameters(), *task.module.buffers()):
                meter.count(tensor.untyped_storage())
            before = meter.live_bytes
            ((_, loss),) = task.losses(batch, rng)
            kept[kind] = meter.live_bytes - before
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[kind] = counter.get_total_flops()
    assert kept["true"] < kept["selective"] < 0.9 * kept["false"]
    assert flops["false"] < flops["selective"] < flops["true"]


@pytest.mark.parametrize("whole", ["model.quantization=fp8", "model.offload=true"])
def test_weights_that_come_and_go_need_every_block_checkpointed(settings, whole):
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: true"):
        settings(whole, SELECTIVE, family="flux")


# Compiled blocks


def assert_close(plain, fast):
    torch.testing.assert_close(fast["loss"], plain["loss"], rtol=1e-6, atol=0)
    assert plain.keys() == fast.keys()
    one, other = (
        torch.cat([value.flatten().double() for value in part.values()]) for part in (plain, fast)
    )
    assert torch.cosine_similarity(one, other, dim=0) > 0.99999
    torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-5, atol=0)


def compare(settings, family, more):
    plain = gradients(*build(settings(*more, family=family)))
    with inductor.patch(fallback_random=True):  # which draws as plain PyTorch does
        assert_close(plain, gradients(*build(settings(*more, COMPILED, family=family))))
    assert counters["stats"]["unique_graphs"] > 1


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sd3", ("train.gradient_accumulation_steps=2",)),
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
    settings, traced, tmp_path
):
    shared = (
        *("validation.prompts=[a b c]", "validation.validation_steps=3", "optimizer.eps=1e-3"),
        f"data.held_out_dir={settings().data.instance_data_dir}",
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
        "train.cuda_graphs=true",
        "model.offload=true",
    ],
)
def test_compiling_is_refused_beside_what_it_cannot_be_had_with(settings, wrong):
    with pytest.raises(UserError, match=r"train\.(compile|cuda_graphs): cannot be had with"):
        settings(COMPILED, wrong, family="flux")


def test_a_u_net_is_not_compiled(settings):
    with pytest.raises(UserError, match=r"train\.compile: gave SD1\.5 wrong gradients"):
        settings(COMPILED)


def test_a_base_that_is_cut_is_not_compiled(settings):
    with pytest.raises(UserError, match=r"train\.compile: .* FSDP2"):
        dreambooth.build(
            settings(COMPILED, family="flux"), Accelerator(cpu=True), shard=lambda model: None
        )


# Attention


def recorded(task):
    with attention.AttentionRecorder() as recorder, torch.no_grad():
        task.module.eval()(*next(task.upcoming_inputs(0))[1])
    return recorder.calls


@pytest.mark.parametrize(("family", "count"), [("sd15", 8), ("sd3", 3), ("flux", 3)])
def test_each_call_of_attention_is_timed_as_often_as_it_comes(settings, family, count):
    calls = recorded(build(settings(family=family))[0])
    assert sum(times for _, times in calls.values()) == count
    assert len(calls) < count
    once = {key: (call, 1) for key, (call, _) in calls.items()}
    assert 0 < attention.time_kernel("flash", once.values()) < 60
    assert 0 < attention.time_kernel("math", calls.values()) < 60
    assert attention.time_kernel("cudnn", calls.values()) == float("inf")


def test_a_mask_is_timed_with_the_call():
    with attention.AttentionRecorder() as recorder:
        q, mask = torch.randn(1, 2, 8, 4), torch.zeros(1, 1, 8, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
        torch.nn.functional.scaled_dot_product_attention(query=q, key=q, value=q)
    (masked, one), (plain, other) = recorder.calls.values()
    assert (masked["attn_mask"] is mask, "attn_mask" in plain, one, other) == (True, False, 1, 1)
    assert attention.time_kernel("math", recorder.calls.values()) < 60


def test_a_kernel_that_cannot_run_is_no_news(recwarn, monkeypatch):
    """On a GPU PyTorch warns six times of each; here the call itself does."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def warning(*args, **kwargs):
        warnings.warn("cuDNN attention kernel not used because:", stacklevel=2)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", warning)
    q = torch.randn(1, 2, 8, 4)
    assert attention.seconds("cudnn", [({"query": q, "key": q, "value": q}, 1)]) == float("inf")
    assert not recwarn.list


def used(task, batches):
    """Whether a step runs PyTorch's fused attention."""
    seen = set()

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Ops():
        gradients(task, batches)
    return any(name.startswith("_scaled_dot_product_flash") for name in seen)


@pytest.mark.parametrize("more", [(), (CHECKPOINTED,)])
def test_the_wished_kernel_runs_until_the_task_ends(settings, more):
    task, batches = build(settings("train.attention=math", *more, family="sd3"))
    assert not used(task, batches)
    explicit = gradients(task, batches)
    del task
    gc.collect()
    task, batches = build(settings("train.attention=flash", *more, family="sd3"))
    assert used(task, batches)
    assert_close(gradients(task, batches), explicit)


def test_what_the_main_process_finds_holds_in_all(settings, monkeypatch):
    monkeypatch.setattr(compilation, "broadcast_object_list", lambda found: ["math", 1.0])
    task, batches = build(settings("train.attention=flash"))
    assert not used(task, batches)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_run_here_is_refused(settings, kernel):
    with pytest.raises(UserError, match=f"train.attention: {kernel} cannot run on cpu"):
        build(settings(f"train.attention={kernel}"))


def test_on_a_cpu_no_clock_decides(settings, monkeypatch):
    monkeypatch.setattr(compilation, "attend", None)
    assert used(*build(settings(family="flux")))


# CUDA graphs


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "model.quantization=nf4",
            "model.modulation_cache=true",
            DROPOUT,
            COMPILED,
            CHECKPOINTED,
            SELECTIVE,
        ),
        *(
            "train.gradient_accumulation_steps=2",
            "train.auto_micro_batch=true",
            "train.train_text_encoder=true",
        ),
    ],
)
def test_graphs_are_refused_beside_what_changes_between_steps(settings, wrong):
    with pytest.raises(
        UserError, match=rf"train\.cuda_graphs: cannot be had with {wrong.split('=')[0]}:"
    ):
        settings("train.cuda_graphs=true", wrong, family="flux")


def test_without_a_gpu_graphs_are_refused(settings):
    with pytest.raises(UserError, match=r"train\.cuda_graphs: needs one process on a CUDA GPU"):
        build(settings("train.cuda_graphs=true"))


def test_graphs_are_asked_for_as_pytorch_wants_it(settings, monkeypatch):
    """That they are right has not been seen: here is only how they are asked for, and taken off
    again."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = Accelerator(cpu=True)
    task, _, _ = dreambooth.build(settings(), accelerator)
    asked = create_autospec(torch.cuda.make_graphed_callables)
    asked.side_effect = lambda module, *_, **__: setattr(module, "forward", lambda *inputs: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", asked)
    (_, inputs), plain = next(task.upcoming_inputs(0)), task.module.forward
    compilation.capture_cuda_graphs(
        task.module.eval(), inputs, SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    )
    given = inspect.signature(torch.cuda.make_graphed_callables).bind(
        *asked.call_args.args, **asked.call_args.kwargs
    )
    assert given.arguments["callables"] is task.module
    assert task.module.training
    mine, own = tree_leaves(inputs), tree_leaves(given.arguments["sample_args"])
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(mine, own, strict=True)
    )
    assert task.module.forward.__wrapped__ is plain
    bare = accelerator.unwrap_model(task.module, keep_fp32_wrapper=False)
    assert bare.forward.__func__ is dreambooth.Denoiser.forward
