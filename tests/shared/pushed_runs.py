"""Finished runs to push to the small Hub of local_hub.py, and what it then holds."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import snapshot_download

from tests.shared.local_hub import serving
from trainers.config.loading import dump_config
from trainers.publishing import hub as publishing_hub
from trainers.publishing.public import public_text

PUBLIC = [
    *(
        "README.md",
        "config.yaml",
        "figures.json",
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
        "report_public.html",
    ),
    *(
        "samples/final/00-0.png",
        "samples/final/grid.png",
        "model/config.json",
        "pipeline/unet/weights.safetensors",
    ),
]
PRIVATE = [
    *("report.html", "evaluation/photos/photo-00.png"),
    *(
        "checkpoints/step-000002/denoiser.safetensors",
        "cache/ab/abcd.safetensors",
        "metrics.jsonl",
        "tracking/events",
    ),
    *(
        "class_images/class-00000.png",
        "samples/step-000002/00-0.png",
        ".push/pytorch_lora_weights.safetensors",
    ),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing_hub, "RETRY_DELAYS", (0, 0))
    with serving(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def finished(settings):
    """A function: keys of `hub` -> Config of a run that goes to me/mine, with a folder as a run
    leaves it."""
    folder = settings().output_dir

    def make(**keys):
        for name in PUBLIC + PRIVATE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = b"\0" * name.endswith(".png") + name.encode()
            if name.endswith(".safetensors"):
                content = safetensors.torch.save({name: torch.ones(2)})
            (folder / name).write_bytes(content)
        (folder / "README.md").write_text("---\ntags: [lora]\n---\n\n# Mine\n")
        keys = {"push_to_hub": True, "hub_model_id": "me/mine"} | keys
        config = settings(*(f"hub.{key}={value}" for key, value in keys.items()))
        (folder / "config.yaml").write_text(dump_config(settings()))
        return config

    return make


@pytest.fixture(params=["xet", "lfs"])
def way(request, monkeypatch):
    """How large files travel: as the client prefers, or as it does with HF_HUB_DISABLE_XET=1."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


def send(config):
    return publishing_hub.push_run(config, publishing_hub.check_access(config))


def clone(name="me/mine", **options):
    """A repository's files as the client downloads them."""
    folder = Path(snapshot_download(name, **options))
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    del found[".gitattributes"]
    return found


def files(config):
    found = {name: (config.output_dir / name).read_bytes() for name in PUBLIC}
    return found | {"config.yaml": public_text(config).encode()}


def same(one, other):
    return one.keys() == other.keys() and all(
        tensor.equal(other[name]) for name, tensor in one.items()
    )
