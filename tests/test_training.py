"""Laws of a training run on a tiny pipeline: gradients, cache, accumulation, processes, resuming,
reloading."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import make_flux, make_t5
from diffusers import DDPMScheduler, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from oracles import assert_trained_alike
from PIL import Image
from processes import start
from safetensors.torch import load_file

from trainers import dreambooth, run_folder
from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import Interrupted, RunFailedError, UserError
from trainers.run import run
from trainers.training import callbacks, checkpoint
from trainers.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent
PRIOR = ("data.class_prompt=c", "data.num_class_images=3", "data.prior_loss_weight=0.5")


def lora(settings):
    return load_file(settings.output_dir / "pytorch_lora_weights.safetensors")


def losses(settings):
    rows = [
        json.loads(line)
        for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [row["denoiser_loss"] for row in rows]


def first_gradients(settings):
    """Loss and gradients of the first micro-batch, with B not at its zero start."""
    task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
    torch.manual_seed(5)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    batch, rng = next(iter(batches(0)))
    ((_, loss),) = task.losses(batch, rng)
    loss.backward()
    return (
        task,
        batch,
        rng.rows,
        loss,
        {name: p.grad for name, p in trainable_parameters(task.module).items()},
    )


@pytest.mark.parametrize("prior", [(), PRIOR])
def test_loss_and_every_gradient_equal_an_independent_step(settings, base, prior):
    """The reference is written from the papers with diffusers' own parts; it shares only the
    draws."""
    task, batch, rows, loss, gradients = first_gradients(settings(*prior))
    pipe, rng = (
        StableDiffusionPipeline.from_pretrained(base),
        SampleRng(0, 0, rows, global_batch_size=2),
    )
    mean, logvar = batch["moments"].chunk(2, dim=1)
    x0 = (mean + (0.5 * logvar).exp() * rng.normal(mean.shape)) * pipe.vae.config.scaling_factor
    eps = rng.normal(x0.shape)
    t = (rng.uniform(stratified=True) * 1000).long()
    x_t = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, eps, t)
    prompts = ["a b c"] * 2 + ["c"] * (len(rows) - 2)
    embeddings, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    task.module.zero_grad()
    prediction = task.family.denoiser(x_t, t, embeddings).sample
    expected = F.mse_loss(prediction[:2], eps[:2])
    if prior:
        expected = expected + 0.5 * F.mse_loss(prediction[2:], eps[2:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trainable_parameters(task.module).items():
        assert gradients[name].abs().max() > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_latents_are_what_the_pipeline_decodes(settings, base, photos):
    """Decoding `latents / scaling_factor` as the pipeline does must give back the autoencoder's own
    reconstruction."""
    task, batches, _ = dreambooth.build(settings("train.train_batch_size=1"), Accelerator(cpu=True))
    batch, rng = next(iter(batches(0)))
    pipe = StableDiffusionPipeline.from_pretrained(base)
    latents = task.family.latents(batch["moments"], rng)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.detach()
    mean, logvar = batch["moments"].chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * SampleRng(0, 0, rng.rows).normal(mean.shape)
    torch.testing.assert_close(decoded, pipe.vae.decode(z).sample.detach())
    assert VaeImageProcessor().postprocess(decoded)[0].size == (16, 16)


@pytest.mark.parametrize("crop", [(), ("data.center_crop=false", "data.random_flip=true")])
def test_no_cache_gives_identical_gradients(settings, crop):
    cached, live = (
        first_gradients(settings(f"data.cache={keep}", *crop))[-1] for keep in ("true", "false")
    )
    assert all(torch.equal(cached[name], live[name]) for name in cached)


def test_a_new_lora_changes_nothing(settings, base):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True))
    unet = StableDiffusionPipeline.from_pretrained(base).unet
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, 16)
    with torch.no_grad():
        assert torch.equal(task.module(x, t, {"text_encoder": text}), unet(x, t, text).sample)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_is_float32_and_nothing_else_trains(settings, precision):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True, mixed_precision=precision))
    for name, parameter in task.module.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert not parameter.requires_grad or parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("override", "told"), [("lora.rank=3", False), ("lora.dropout=0.1", True), ("lora=null", True)]
)
def test_a_base_in_half_precision_computes_in_it_and_autocast_only_helps_float32_weights(
    settings, override, told
):
    """Autocast would have norms compute, and keep their inputs, in float32."""
    task, batches, _ = dreambooth.build(
        settings(override), Accelerator(cpu=True, mixed_precision="bf16")
    )
    seen = []
    task.family.denoiser.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    ((_, loss),) = task.losses(*next(iter(batches(0))))
    loss.backward()
    assert seen == [told]
    assert all(p.grad.dtype == torch.float32 for p in trainable_parameters(task.module).values())


def test_encoders_are_freed_before_the_denoiser_loads(settings):
    task, _, _ = dreambooth.build(settings(), Accelerator(cpu=True))
    assert task.family.pipe.text_encoder is None
    assert task.family.pipe.vae is None


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
    "all weights": ("lora=null", "train.train_text_encoder=true"),
    "8-bit": ("optimizer.name=adamw_8bit",),
    "adafactor": ("optimizer.name=adafactor", "optimizer.lr_scheduler=cosine"),
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_run_ends_with_weights_that_reload_and_learns(settings, overrides):
    """`run` itself fails when the exported file does not reload; here the files of a run are
    checked."""
    final = settings("validation.prompts=[a b c, x]", "validation.validation_steps=3", *overrides)
    run(final)
    names = {path.name for path in final.output_dir.iterdir()}
    weights = "pytorch_lora_weights.safetensors" if final.lora else "pipeline"
    assert names >= {"config.yaml", "metrics.jsonl", "README.md", "samples", "checkpoints", weights}
    assert {path.name for path in (final.output_dir / "samples").iterdir()} == {
        "step-000003",
        "step-000006",
        "final",
    }
    assert [path.name for path in sorted((final.output_dir / "checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    assert loading.load_config(final.output_dir / "config.yaml") == final
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


def command(path, *overrides):
    return [sys.executable, "scripts/train.py", str(path), *overrides]


def environment(**more):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    }
    return clean | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


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


def test_three_steps_and_three_more_equal_six(settings, tmp_path):
    overrides = (
        "train.ema_decay=0.9",
        "lora.dropout=0.1",
        "data.random_flip=true",
        "optimizer.lr_scheduler=constant",
    )
    whole = settings(*overrides, f"output_dir={tmp_path}/whole")
    parts = settings(*overrides, f"output_dir={tmp_path}/parts")
    run(whole)
    run(parts.model_copy(update={"train": parts.train.model_copy(update={"max_train_steps": 3})}))
    run(parts)
    assert losses(whole) == losses(parts)
    assert lora(whole).keys() == lora(parts).keys()
    assert all(torch.equal(lora(whole)[name], lora(parts)[name]) for name in lora(whole))


@pytest.mark.parametrize(
    "change", ["lora.rank=4", "seed=1", "data.instance_prompt=d", "train.train_batch_size=3"]
)
def test_resuming_another_configuration_is_refused(settings, change):
    run(settings("train.max_train_steps=2"))
    with pytest.raises(UserError, match="was made by another configuration"):
        run(settings(change))


def test_a_finished_run_is_never_overwritten(settings):
    run(settings("train.max_train_steps=2"))
    with pytest.raises(UserError, match="holds a run already"):
        run(settings("checkpoint.resume_from_checkpoint=null"))


@pytest.fixture
def undisturbed(settings, tmp_path):
    final = settings(
        *PRIOR,
        "train.max_train_steps=30",
        "checkpoint.checkpointing_steps=1",
        f"output_dir={tmp_path}/whole",
    )
    run(final)
    return final


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_any_moment_and_the_same_command_give_the_same_weights(
    undisturbed, tmp_path, seed
):
    """Kills land in steps and inside saves: a checkpoint is written at each step, and half the time
    goes there."""
    killed = undisturbed.model_copy(update={"output_dir": tmp_path / "killed"})
    (tmp_path / "killed.yaml").write_text(loading.dump_config(killed))
    r, checkpoints = random.Random(seed), tmp_path / "killed" / "checkpoints"
    for wanted in sorted(r.sample(range(2, 28), 2)):
        process = start("train.py", tmp_path / "killed.yaml", log=tmp_path / "log")
        while process.is_alive() and not list(checkpoints.glob(f"*step-{wanted:06d}")):
            time.sleep(0.001)
        time.sleep(r.uniform(0, 0.05))
        process.kill()
        process.join()
    again = start("train.py", tmp_path / "killed.yaml", log=tmp_path / "log")
    again.join()
    assert again.exitcode == 0
    assert losses(undisturbed) == losses(killed)
    assert all(
        torch.equal(lora(undisturbed)[name], lora(killed)[name]) for name in lora(undisturbed)
    )


def test_a_signal_checkpoints_and_exits_with_its_status(undisturbed, tmp_path):
    (tmp_path / "stopped.yaml").write_text(
        loading.dump_config(undisturbed.model_copy(update={"output_dir": tmp_path / "stopped"}))
    )
    steps = command(
        tmp_path / "stopped.yaml",
        "checkpoint.checkpointing_steps=1000",
        "train.max_train_steps=100000",
    )
    process = subprocess.Popen(steps, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    while not (tmp_path / "stopped" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert len(list((tmp_path / "stopped" / "checkpoints").iterdir())) == 1


def test_a_damaged_checkpoint_is_passed_over(settings):
    run(settings())
    newest = settings().output_dir / "checkpoints" / "step-000006" / "denoiser.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = lora(settings())
    with pytest.warns(UserWarning, match="step-000006 is damaged"):
        run(settings())
    assert all(torch.equal(before[name], lora(settings())[name]) for name in before)


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
    with pytest.raises(
        RunFailedError,
        match=r"5 steps in a row had no finite gradient, .* step 6: .* Lower optimizer",
    ):
        run(
            settings(
                "lora=null",
                "optimizer.learning_rate=1e30",
                "train.max_grad_norm=1e30",
                "data.cache=false",
            )
        )


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


def held_out_losses(settings):
    rows = [
        json.loads(line)
        for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row]


@pytest.fixture
def others(tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    for i, level in enumerate((40, 200)):
        Image.new("RGB", (20, 20), (level, 255 - level, 90)).save(folder / f"{i}.png")
    return folder


def test_held_out_photos_are_measured_on_and_never_learnt_from(settings, others, tmp_path):
    """With dropout, averaged weights and dropped captions, so that measuring could disturb."""
    shared = (
        "validation.validation_steps=2",
        "lora.dropout=0.2",
        "train.ema_decay=0.5",
        "data.caption_dropout=0.5",
    )
    plain = settings(*shared, f"output_dir={tmp_path}/plain")
    measured = settings(*shared, f"data.held_out_dir={others}", f"output_dir={tmp_path}/measured")
    run(plain)
    run(measured)
    assert losses(plain) == losses(measured)
    assert all(torch.equal(value, lora(measured)[key]) for key, value in lora(plain).items())
    found = held_out_losses(measured)
    assert len(found) == 3
    assert len(set(found)) == 3
    assert not held_out_losses(plain)


def test_the_held_out_loss_has_the_same_times_and_noise_at_every_step(settings, others):
    still = settings(
        f"data.held_out_dir={others}", "validation.validation_steps=1", "optimizer.learning_rate=0"
    )
    run(still)
    assert len(set(held_out_losses(still))) == 1
    task, _, _ = dreambooth.build(still, Accelerator(cpu=True))
    rows = list(task.held_out_batches(0))
    errors = []
    for batch, rng in rows:
        x0 = task.family.latents(batch["moments"], rng)
        eps = task.objective.noise(x0, rng)
        t = task.objective.times(rng)
        with torch.no_grad():
            predicted = task.module(task.objective.corrupt(x0, eps, t), t, batch["text"])
        errors.append(F.mse_loss(predicted, eps))
    assert held_out_losses(still)[0] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert len(rows) == 8


def test_a_held_out_folder_that_is_not_there_is_told(settings, tmp_path):
    with pytest.raises(UserError, match=r"data\.held_out_dir: no such folder"):
        settings(f"data.held_out_dir={tmp_path}/nowhere")


@pytest.fixture
def handlers():
    """The signals' handlers are put back."""
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("trained", [False, True], ids=["after training", "after a resume"])
def test_a_signal_while_the_end_is_measured_stops_at_once(settings, monkeypatch, handlers, trained):
    if trained:
        run(settings())

    def finish(task, steps):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)
        pytest.fail("it went on")

    monkeypatch.setattr(dreambooth.DreamBooth, "finish", finish)
    with pytest.raises(Interrupted):
        run(settings())
    assert (settings().output_dir / "checkpoints/step-000006").is_dir()


def test_a_signal_in_the_last_save_stops_the_run_after_it(settings, monkeypatch, handlers):
    save = callbacks.save_checkpoint

    def signalled(config, task, accelerator, state, prune):
        save(config, task, accelerator, state, prune)
        if state.step == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(callbacks, "save_checkpoint", signalled)
    with pytest.raises(Interrupted):
        run(settings())
    assert read_checkpoint(settings().output_dir / "checkpoints/step-000006")


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(settings, monkeypatch):
    class Killed(BaseException):
        pass

    def half(folder, ignore_errors=False):
        if "000002" in str(folder) and not ignore_errors:
            next(folder.glob("*.safetensors")).unlink()
            raise Killed
        shutil.rmtree(folder, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=half))
        with pytest.raises(Killed):
            run(settings("checkpoint.checkpoints_total_limit=1"))
    root = settings().output_dir / "checkpoints"
    assert all(read_checkpoint(folder) for folder in run_folder.list_checkpoints(root))
    run(settings())
    assert not list(root.glob(".*"))
