"""A DreamBooth run from its config to weights that reload, in one process and in two."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image

from tests.shared.by_hand import by_hand_but
from tests.shared.oracles import assert_trained_alike
from tests.shared.processes import ROOT
from tests.shared.runs import PRIOR, command, environment, lora, losses
from tests.shared.tiny_pipelines import make_flux, make_t5
from trainers.config import loading
from trainers.errors import RunFailedError, UserError
from trainers.run import run
from trainers.run_folder import list_checkpoints

VARIANTS = {
    "plain": (),
    "prior": PRIOR,
    "text encoder": ("train.train_text_encoder=true", "optimizer.text_encoder_lr=1e-3", *PRIOR),
    "scaled": ("lora.alpha=5", "lora.use_rslora=true"),
    "dora": ("lora.use_dora=true", "lora.alpha=3"),
    "orthogonal": (
        "lora.init_lora_weights=orthogonal",
        "lora.dropout=0.2",
        "lora.target_modules=attention+mlp",
    ),
    "ema": (
        "train.ema_decay=0.9",
        "train.gradient_checkpointing=true",
        "lora.target_modules=all-linear",
    ),
    "uncached": (
        "data.cache=false",
        "data.caption_dropout=0.5",
        "objective.snr_gamma=5",
        "objective.noise_offset=0.1",
    ),
    # so that the caption as it is written is none of the texts
    "shuffled": (
        "data.instance_prompt='a, b, c, d, e'",
        "data.shuffle_tags=true",
        "data.caption_variants=1",
    ),
    "all weights": ("lora=null", "train.train_text_encoder=true"),
    "8-bit": ("optimizer.name=adamw_8bit",),
    "adafactor": ("optimizer.name=adafactor", "optimizer.lr_scheduler=cosine"),
}
VARIANTS_EACH_TIME = ("text encoder", "scaled", "ema", "uncached", "all weights", "8-bit")


@pytest.mark.parametrize("variant", by_hand_but(VARIANTS_EACH_TIME, VARIANTS))
def test_a_run_ends_with_weights_that_reload_and_learns(settings, variant):
    """`run` itself fails when the exported file does not reload; here the files of a run are
    checked."""
    shown = ("validation.prompts=[a b c, x]", "validation.validation_steps=3")
    final = settings(*shown, *VARIANTS[variant])
    run(final)
    names = {path.name for path in final.output_dir.iterdir()}
    weights = "pytorch_lora_weights.safetensors" if final.lora else "pipeline"
    assert names >= {"config.yaml", "metrics.jsonl", "README.md", "samples", "checkpoints", weights}
    assert {path.name for path in (final.output_dir / "samples").iterdir()} == {
        "step-000000",
        "step-000003",
        "step-000006",
        "final",
    }
    newest = list_checkpoints(final.output_dir / "checkpoints")
    assert [path.name for path in newest] == ["step-000006", "step-000004"]
    # what `auto` came to on a CPU is recorded
    train = final.train.model_copy(update={"mixed_precision": "no"})
    recorded = final.model_copy(update={"train": train})
    assert loading.load_config(final.output_dir / "config.yaml") == recorded
    if final.lora:
        assert any(
            tensor.abs().max() > 0 for name, tensor in lora(final).items() if "lora_B" in name
        )


def test_the_final_sample_is_reproduced_by_plain_diffusers(settings, base, tmp_path):
    final = settings("validation.prompts=[a b c]", "validation.num_images=2", "lora.alpha=5")
    run(final)
    script = f"""
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(base)!r})
pipe.load_lora_weights({str(final.output_dir)!r})
noise = torch.Generator().manual_seed(1)
settings = dict(height=16, width=16, num_inference_steps=2, guidance_scale=2)
image = pipe("a b c", **settings, generator=noise).images[0]
image.save({str(tmp_path / "plain.png")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    ours = Image.open(final.output_dir / "samples/final/00-1.png")
    assert ours.tobytes() == Image.open(tmp_path / "plain.png").tobytes()


def test_accumulation_equals_one_batch(settings, tmp_path):
    one = settings("train.train_batch_size=4", *PRIOR, f"output_dir={tmp_path}/one")
    two = settings(
        "train.train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        *PRIOR,
        f"output_dir={tmp_path}/two",
    )
    run(one)
    run(two)
    assert_trained_alike(
        (losses(one), losses(two)), (lora(one), lora(two)), one.optimizer.learning_rate
    )


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    one = settings("train.train_batch_size=2", *PRIOR, f"output_dir={tmp_path}/one")
    run(one)
    (tmp_path / "two.yaml").write_text(loading.dump_config(one))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launch += ["--main_process_port", "0", "scripts/train.py", str(tmp_path / "two.yaml")]
    launch += ["train.train_batch_size=1", f"output_dir={tmp_path}/two"]
    done = subprocess.run(
        launch, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = loading.load_config(tmp_path / "two/config.yaml")
    assert_trained_alike(
        (losses(one), losses(two)), (lora(one), lora(two)), one.optimizer.learning_rate
    )


def test_a_world_size_that_was_not_got_is_refused(settings, monkeypatch):
    monkeypatch.setenv(
        "MASTER_PORT", "29500"
    )  # what `accelerate launch --cpu --num_processes 2` leaves
    with pytest.raises(UserError, match="several processes"):
        run(settings())


def test_class_images_are_completed_not_remade(settings):
    once = settings(*PRIOR, "data.class_prompt=[c, d e]")
    run(once)
    folder = once.output_dir / "class_images"
    assert [(folder / f"class-{i:05d}.txt").read_text() for i in range(3)] == ["c", "d e", "c"]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "class-00001.png").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    run(once)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def test_divergence_stops_with_a_message(settings):
    config = settings("lora=null", "data.cache=false")
    # no config can ask for these
    optimizer = config.optimizer.model_copy(update={"learning_rate": 1e30})
    train = config.train.model_copy(update={"max_grad_norm": 1e30})
    config = config.model_copy(update={"optimizer": optimizer, "train": train})
    with pytest.raises(
        RunFailedError,
        match=r"5 steps in a row had no finite gradient, .* step 6: .* Lower optimizer",
    ):
        run(config)


def test_unknown_target_modules_name_what_exists(settings):
    with pytest.raises(UserError, match=r"lora.target_modules.*to_q"):
        run(settings("lora.target_modules=[to_qq]"))


def test_a_missing_base_model_is_the_users_mistake(settings):
    with pytest.raises(UserError, match="pretrained_model_name_or_path"):
        run(settings("model.pretrained_model_name_or_path=nobody/nothing"))


def weight(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**30


@pytest.mark.slow
def test_encoders_and_denoiser_are_never_in_memory_together(settings, tmp_path):
    """A Flux.1 whose T5 outweighs its transformer, 2.5 GiB in all: the peak of a whole run is below
    their sum."""
    pipe = make_flux()
    pipe.text_encoder_2 = make_t5(width=32, layers=110, inner=32768)
    wide = {"attention_head_dim": 192, "num_attention_heads": 4, "axes_dims_rope": (64, 64, 64)}
    deep = {"num_layers": 8, "num_single_layers": 16}
    pipe.register_modules(
        transformer=FluxTransformer2DModel.from_config(pipe.transformer.config | wide | deep)
    )
    pipe.save_pretrained(tmp_path / "large")
    encoders = sum(weight(tmp_path / "large" / name) for name in ("text_encoder", "text_encoder_2"))
    denoiser = weight(tmp_path / "large" / "transformer")
    del pipe
    large = settings(
        f"model.pretrained_model_name_or_path={tmp_path}/large",
        *PRIOR,
        "validation.prompts=[a b c]",
        family="flux",
    )
    (tmp_path / "large.yaml").write_text(loading.dump_config(large))
    process, peak = (
        subprocess.Popen(command(tmp_path / "large.yaml"), cwd=ROOT, env=environment()),
        0.0,
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(kib) / 2**20 for kib in re.findall(r"VmHWM:\s+(\d+)", status)), 0.0)
        time.sleep(0.1)
    print(
        f"encoders {encoders:.2f} GiB, denoiser {denoiser:.2f} GiB, peak of the run {peak:.2f} GiB"
    )
    assert process.returncode == 0
    assert peak < encoders + denoiser
