"""Laws of DeepSpeed ZeRO-2 and ZeRO-3: the training of one plain process, whose checkpoints are exchanged with theirs."""

import json
from functools import partial

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from test_training import PRIOR

from trainers import UserError, config
from trainers.processes import make_accelerator
from trainers.run import run

pytest.importorskip("deepspeed")

BOTH = pytest.mark.parametrize("stage", [2, 3])


@pytest.fixture
def launched(tmp_path):
    """A function: settings, ZeRO stage -> what two processes printed. ZeRO-3 cuts even the smallest weights."""

    def go(settings, stage, statuses=(0, 0), before=None, **more):
        path, name = tmp_path / "deepspeed.json", settings.output_dir.name
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
        (tmp_path / f"{name}.yaml").write_text(config.dump(settings))
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": path, **more}
        log = tmp_path / f"{name}.log"
        ended = launch(
            "train.py", tmp_path / f"{name}.yaml", log=log, processes=2, before=before, **environment
        )
        printed = [(tmp_path / f"{name}.log.{rank}").read_text() for rank in range(2)]
        assert ended == list(statuses), "\n".join(printed)[-4000:]
        return printed

    return go


def half(settings, **changes):
    """The same global batch for each of two processes."""
    return settings.model_copy(update={"train": settings.train.model_copy(update={"train_batch_size": 1, **changes})})


def rows(settings, name):
    lines = (json.loads(line) for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def weights(settings):
    found = sorted([*settings.output_dir.glob("*.safetensors"), *settings.output_dir.glob("pipeline/unet/*.safetensors")])
    found += sorted(settings.output_dir.glob("model/*.safetensors"))
    assert found
    return {f"{path.name} {name}": tensor for path in found for name, tensor in load_file(path).items()}


def assert_alike(one, other, *more):
    for name in (*more, next(n for n in ("denoiser_loss", "autoencoder_loss") if rows(one, n))):
        torch.testing.assert_close(rows(one, name), rows(other, name), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    far = max((weights(one)[n] - tensor).abs().max().item() for n, tensor in weights(other).items())
    print(f"weights differ by {far:.1e} at most")
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)


def held(settings):
    return (f"data.held_out_dir={settings().data.instance_data_dir}", "validation.validation_steps=3")


EVERYTHING = (*PRIOR, "validation.prompts=[a b c, x, y]", "train.gradient_accumulation_steps=2")


@BOTH
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_two_processes_train_lora_as_one(settings, launched, tmp_path, family, stage):
    """With class pictures, held-out photos, samples, the text encoder and the reload proof."""
    more = (*EVERYTHING, *held(settings), "train.train_text_encoder=true", "optimizer.text_encoder_lr=3e-3")
    one = settings(*more, f"output_dir={tmp_path}/one", family=family)
    two = half(settings(*more, f"output_dir={tmp_path}/two", family=family))
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")
    assert len(rows(two, "held_out_loss")) == 2
    for name in ("step-000003/02-0.png", "step-000006/grid.png", "final/grid.png"):
        assert (two.output_dir / "samples" / name).exists()


@BOTH
def test_two_processes_train_all_weights_as_one(settings, launched, tmp_path, stage):
    more = ("lora=null", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-3", *EVERYTHING, *held(settings))
    one, two = settings(*more, f"output_dir={tmp_path}/one"), half(settings(*more, f"output_dir={tmp_path}/two"))
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")
