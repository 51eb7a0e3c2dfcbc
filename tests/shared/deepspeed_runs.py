"""Runs of two DeepSpeed processes, and what they must have in common with a plain one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.shared.processes import launch
from tests.shared.runs import read_metrics
from trainers.config import loading


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
    return [row[name] for row in read_metrics(settings) if name in row]


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
