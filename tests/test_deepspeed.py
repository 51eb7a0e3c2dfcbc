"""Laws of DeepSpeed ZeRO-2 and ZeRO-3: the training of one plain process, which shares its
checkpoints with them."""

import json
import re
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from processes import launch
from safetensors.torch import load_file
from test_training import PRIOR

from trainers.config import loading
from trainers.distributed import deepspeed
from trainers.distributed.accelerator import make_accelerator
from trainers.dreambooth import DreamBooth
from trainers.errors import UserError
from trainers.run import run

pytest.importorskip("deepspeed")

BOTH = pytest.mark.parametrize("stage", [2, 3])


@pytest.fixture
def launched(tmp_path):
    """A function: settings, ZeRO stage -> what two processes printed. ZeRO-3 cuts weights of more
    numbers than kept."""

    def go(settings, stage, statuses=(0, 0), before=None, kept=64, **more):
        path, name = tmp_path / "deepspeed.json", settings.output_dir.name
        zero = {"stage": stage, "stage3_param_persistence_threshold": kept}
        path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
        (tmp_path / f"{name}.yaml").write_text(loading.dump_config(settings))
        environment = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": path,
            **more,
        }
        log = tmp_path / f"{name}.log"
        ended = launch(
            "train.py",
            tmp_path / f"{name}.yaml",
            log=log,
            processes=2,
            before=before,
            limit=240,
            **environment,
        )
        printed = [(tmp_path / f"{name}.log.{rank}").read_text() for rank in range(2)]
        assert ended == list(statuses), "\n".join(printed)[-4000:]
        return printed

    return go


def half(settings, **changes):
    """The same global batch for each of two processes."""
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"train_batch_size": 1, **changes})}
    )


def rows(settings, name):
    lines = (
        json.loads(line)
        for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    )
    return [line[name] for line in lines if name in line]


def weights(settings):
    found = sorted(
        [
            *settings.output_dir.glob("*.safetensors"),
            *settings.output_dir.glob("pipeline/unet/*.safetensors"),
        ]
    )
    found += sorted(settings.output_dir.glob("model/*.safetensors"))
    assert found
    return {
        f"{path.name} {name}": tensor for path in found for name, tensor in load_file(path).items()
    }


def assert_alike(one, other, *more):
    for name in (*more, next(n for n in ("denoiser_loss", "autoencoder_loss") if rows(one, n))):
        torch.testing.assert_close(
            rows(one, name), rows(other, name), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    far = max((weights(one)[n] - tensor).abs().max().item() for n, tensor in weights(other).items())
    print(f"weights differ by {far:.1e} at most")
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)


EVERYTHING = (*PRIOR, "validation.prompts=[a b c, x]", "checkpoint.checkpointing_steps=6")


@pytest.fixture
def held(tmp_path):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (20, 20), (40, 215, 90)).save(tmp_path / "held" / "0.png")
    return (f"data.held_out_dir={tmp_path}/held", "validation.validation_steps=3")


@BOTH
@pytest.mark.parametrize("family", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def test_two_processes_train_lora_as_one(settings, held, launched, tmp_path, family, stage):
    """With class pictures, held-out photos, samples, the text encoder and the reload proof."""
    more = (
        *EVERYTHING,
        *held,
        "train.gradient_accumulation_steps=2",
        "train.train_text_encoder=true",
        "optimizer.text_encoder_lr=3e-3",
    )
    one = settings(*more, f"output_dir={tmp_path}/one", family=family)
    two = half(settings(*more, f"output_dir={tmp_path}/two", family=family))
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")
    assert len(rows(two, "held_out_loss")) == 2
    for name in ("step-000003/01-0.png", "step-000006/grid.png", "final/grid.png"):
        assert (two.output_dir / "samples" / name).exists()


@pytest.mark.slow
@BOTH
def test_two_processes_train_all_weights_as_one(settings, held, launched, tmp_path, stage):
    more = ("lora=null", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-3", *EVERYTHING, *held)
    one, two = (
        settings(*more, f"output_dir={tmp_path}/one"),
        half(settings(*more, f"output_dir={tmp_path}/two")),
    )
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")


def networks(bars, tmp_path, kind, *overrides):
    """The config of a six-step run of a small network."""
    path = tmp_path / "network.yaml"
    path.write_text(
        f"""
kind: {kind}
data: {{dataset_name: {bars}, resolution: 16}}
model: {{width: 8}}
optimizer: {{learning_rate: 1e-3, eps: 1e-3}}
train: {{max_train_steps: 6, train_batch_size: 2}}
tracking: {{report_to: [], log_every: 1}}
"""
    )
    return loading.load_config(path, overrides)


def test_two_processes_train_an_autoencoder_as_one(bars, launched, tmp_path):
    more = ("model.variational=true", "train.ema_decay=0.9", "data.label_column=label")
    one = networks(bars, tmp_path, "autoencoder", *more, f"output_dir={tmp_path}/one")
    two = half(networks(bars, tmp_path, "autoencoder", *more, f"output_dir={tmp_path}/two"))
    run(one)
    launched(two, 2)
    assert_alike(one, two, "autoencoder_grad_norm")
    metrics = [json.loads((run.output_dir / "figures.json").read_text()) for run in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@BOTH
@pytest.mark.parametrize("first", ["plain", "deepspeed"])
def test_three_steps_on_two_processes_and_three_on_one_equal_six(
    settings, launched, tmp_path, first, stage
):
    """And three on one, then three on two. One learning rate for each of two groups of
    parameters."""
    more = (
        "train.train_text_encoder=true",
        "optimizer.text_encoder_lr=3e-3",
        "checkpoint.checkpointing_steps=3",
    )
    whole = settings(*more, f"output_dir={tmp_path}/whole")
    parts = settings(*more, f"output_dir={tmp_path}/parts")
    run(whole)
    short = parts.model_copy(
        update={"train": parts.train.model_copy(update={"max_train_steps": 3})}
    )
    if first == "plain":
        run(short)
        assert "resumed from" in launched(half(parts), stage, kept=0)[0]
    else:
        launched(half(short), stage, kept=0)
        run(parts)
    assert_alike(whole, parts)
    ours, theirs = (
        torch.load(run.output_dir / "checkpoints/step-000006/denoiser.optimizer.pt")
        for run in (whole, parts)
    )
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in ours["state"].items():
        torch.testing.assert_close(theirs["state"][i], state, rtol=1e-3, atol=1e-5)


def spoil(rank=None):
    """The loss of the third step is no number, in one of the processes or in all."""
    sound = DreamBooth.losses

    def losses(task, batch, rng):
        for name, loss in sound(task, batch, rng):
            here = rng.step == 2 and rank in (None, task.accelerator.process_index)
            yield name, loss * float("nan") if here else loss

    DreamBooth.losses = losses


@BOTH
def test_a_step_whose_loss_is_no_number_in_one_process_is_skipped_in_both(
    settings, launched, tmp_path, monkeypatch, stage
):
    once = ("checkpoint.checkpointing_steps=6", "train.max_train_steps=4")
    one, two = (
        settings(*once, f"output_dir={tmp_path}/one"),
        half(settings(*once, f"output_dir={tmp_path}/two")),
    )
    printed = launched(two, stage, before=partial(spoil, 1))
    assert (
        "step 3 was skipped, for its gradient is not finite (1 so far): loss of denoiser"
        in printed[1]
    )
    assert rows(two, "skipped") == [1]
    monkeypatch.setattr(DreamBooth, "losses", DreamBooth.losses)
    spoil()
    with pytest.warns(UserWarning, match="step 3 was skipped"):
        run(one)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "change", [(), ("lora=null", "optimizer.learning_rate=1e-3")], ids=["lora", "all weights"]
)
def test_bf16_computes_in_bf16_and_trains_in_float32(
    settings, launched, tmp_path, monkeypatch, change, stage
):
    more = ("checkpoint.checkpointing_steps=6", *change)
    one = settings(*more, f"output_dir={tmp_path}/one", family="flux")
    two = half(settings(*more, f"output_dir={tmp_path}/two", family="flux"))
    exact = settings(*more, f"output_dir={tmp_path}/exact", family="flux")
    run(exact)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(one)
    launched(two, stage, ACCELERATE_MIXED_PRECISION="bf16")
    torch.testing.assert_close(
        rows(one, "denoiser_loss"), rows(two, "denoiser_loss"), rtol=1e-2, atol=0
    )
    assert rows(exact, "denoiser_loss")[0] != rows(two, "denoiser_loss")[0]
    state = load_file(two.output_dir / "checkpoints/step-000006/denoiser.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert any((tensor != tensor.bfloat16()).any() for tensor in state.values())


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


def test_deepspeed_that_did_not_start_is_told(settings, launched):
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
