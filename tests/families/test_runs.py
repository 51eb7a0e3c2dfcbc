"""Runs of SDXL, SD3, Flux: resuming, accumulation, bfloat16, samples that diffusers reproduces."""

import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageChops

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.families import FLOWS, LENGTH, TEXT
from tests.shared.runs import (
    PRIOR,
    VARIED_CAPTIONS,
    assert_close,
    assert_same,
    lora,
    run_steps,
)
from trainers.run import run

NAMES = ("sdxl", *FLOWS)


@pytest.mark.parametrize("name", by_hand_but(EACH_TIME, NAMES))
def test_three_steps_and_three_more_equal_six(settings, tmp_path, captioned_photos, name):
    overrides = (
        f"data.instance_data_dir={captioned_photos}",
        *VARIED_CAPTIONS,
        "train.ema_decay=0.9",
        "lora.dropout=0.1",
        TEXT,
        f"data.cache_dir={tmp_path}/cache",
    )
    straight = settings(*overrides, f"output_dir={tmp_path}/straight", family=name)
    parts = settings(*overrides, f"output_dir={tmp_path}/parts", family=name)
    run(straight)
    run_steps(parts, 3)
    run(parts)
    assert_same(straight, parts)


@pytest.mark.parametrize("name", by_hand_but(["sdxl"], NAMES))
def test_accumulation_equals_one_batch(settings, tmp_path, captioned_photos, name):
    captions = (f"data.instance_data_dir={captioned_photos}", *VARIED_CAPTIONS)
    shared = (
        *PRIOR,
        *captions,
        f"data.class_data_dir={tmp_path}/class",
        f"data.cache_dir={tmp_path}/cache",
    )
    one = settings("train.train_batch_size=2", *shared, f"output_dir={tmp_path}/one", family=name)
    parts = ("train.train_batch_size=1", "train.gradient_accumulation_steps=2")
    two = settings(*parts, *shared, f"output_dir={tmp_path}/two", family=name)
    run(one)
    run(two)
    assert_close(one, two)


@pytest.mark.parametrize("name", by_hand_but(EACH_TIME, NAMES))
def test_a_bfloat16_run_ends_with_weights_that_reload(settings, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    final = settings(
        *PRIOR, TEXT, "validation.prompts=[a b c]", "train.max_train_steps=2", family=name
    )
    run(final)
    assert all(tensor.dtype == torch.float32 for tensor in lora(final).values())


@pytest.mark.slow
def test_the_final_samples_are_reproduced_by_plain_diffusers(settings, bases, tmp_path):
    """And they are not what the base draws."""
    script = ["import torch", "from diffusers import DiffusionPipeline"]
    finals = {}
    for name in NAMES:
        overrides = (
            *PRIOR,
            TEXT,
            "lora.alpha=5",
            "validation.prompts=[a b c]",
            f"output_dir={tmp_path}/{name}",
        )
        finals[name] = settings(*overrides, family=name)
        run(finals[name])
        script += [f"pipe = DiffusionPipeline.from_pretrained({str(bases[name])!r})"]
        for kind in ("base", "lora"):
            script += (
                [f"pipe.load_lora_weights({str(finals[name].output_dir)!r})"]
                if kind == "lora"
                else []
            )
            length = f"max_sequence_length={LENGTH}, " if name in FLOWS else ""
            script += [
                "image = pipe('a b c', height=16, width=16, num_inference_steps=2, "
                "guidance_scale=2,"
                f" {length}generator=torch.Generator().manual_seed(0)).images[0]",
                f"image.save({str(tmp_path / f'{name}-{kind}.png')!r})",
            ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], check=True, capture_output=True)
    for name, final in finals.items():
        ours = Image.open(final.output_dir / "samples/final/00-0.png")
        assert ours.tobytes() == Image.open(tmp_path / f"{name}-lora.png").tobytes(), name
        assert ImageChops.difference(ours, Image.open(tmp_path / f"{name}-base.png")).getbbox(), (
            name
        )
