"""A run that starts from a LoRA computes, before its first step, what the base with it computes."""

import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi

from tests.shared.local_hub import serving
from trainers import dreambooth
from trainers.errors import UserError
from trainers.lora import diffusers_format, initial, peft_format
from trainers.lora.base_layers import merge_lora
from trainers.lora.initial import adapted_layers
from trainers.lora.update import LoraUpdate
from trainers.run import run
from trainers.run_folder import WEIGHT_NAME
from trainers.training.checkpoint import read_checkpoint

START = ("lora.target_modules=[to_q, to_k, to_v, to_out.0]",)


@pytest.fixture
def make_file(build, tmp_path):
    """A function: a LoRA file of random updates of all layers that a config trains, of a rank."""

    def make(*overrides, family="sd15", rank=3, dora=False, format=diffusers_format, drop=()):
        task = build(*overrides, "lora.use_dora=false", family=family)
        rng, lora = torch.Generator().manual_seed(1), {}
        for name, layer in adapted_layers(task.family, task.encoder.trained_encoders):
            if any(part in name for part in drop):
                continue
            weight, a = layer.get_base_layer().weight, layer.lora_A["default"].weight
            a = torch.randn((rank, *a.shape[1:]), generator=rng)
            b = torch.randn((len(weight), rank, *[1] * (weight.ndim - 2)), generator=rng) / 9
            magnitude = torch.rand(len(weight), generator=rng) + 0.5 if dora else None
            lora[name] = LoraUpdate(a, b, magnitude)
        path = tmp_path / f"start{format.SUFFIX}"
        format.write(lora, task.family, path, {})
        return path, lora

    return make


def weights(task):
    """The weight that each layer of a task computes with, by name."""
    found = {}
    for name, layer in adapted_layers(task.family, task.encoder.trained_encoders):
        layer.merge(safe_merge=True)
        found[name] = layer.get_base_layer().weight.detach().clone()
        layer.unmerge()
    return found


def base_weights(task):
    layers = adapted_layers(task.family, task.encoder.trained_encoders)
    return {name: layer.get_base_layer().weight.detach() for name, layer in layers}


def assert_starts_as(task, lora):
    base, found = base_weights(task), weights(task)
    assert found.keys() == base.keys()
    for name, weight in base.items():
        wanted = lora[name].apply_to(weight).float() if name in lora else weight
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize(
    "options",
    [
        ["lora.rank=3"],
        ["lora.rank=5", "lora.alpha=2", "lora.use_rslora=true"],
        ["lora.rank=4", "lora.init_lora_weights=orthogonal", "lora.target_modules=all-linear"],
    ],
    ids=["equal", "larger", "orthogonal"],
)
def test_at_step_0_it_is_the_base_with_the_file(build, make_file, family, options):
    path, lora = make_file(*options, family=family)
    task = build(*options, f"lora.init_from={path}", family=family)
    assert_starts_as(task, lora)
    for _, layer in adapted_layers(task.family, ()):
        # what is beyond the file can learn: a row of A that is not zero
        assert layer.lora_A["default"].weight.flatten(1).any(dim=1).all()
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.lora_A["default"].weight.requires_grad


def test_the_denoiser_gives_what_the_merged_base_gives(build, make_file, settings):
    path, lora = make_file("lora.rank=2", rank=2)
    task = build("lora.rank=4", f"lora.init_from={path}")
    output = task.probe_output("a b c")
    plain = build("lora.rank=4")
    assert (plain.probe_output("a b c") - output).norm() > 0.01 * output.norm()
    merged = dreambooth.open_family(task.config.model, task.family.device, torch.float32, None)
    merged.load("unet", "text_encoder")
    merge_lora(merged, lora)
    plain.family.pipe.unet.load_state_dict(
        {
            re.sub(r"(to_q|to_k|to_v|to_out\.0)\.", r"\1.base_layer.", name): value
            for name, value in merged.pipe.unet.state_dict().items()
        },
        strict=False,
    )
    torch.testing.assert_close(plain.probe_output("a b c"), output, rtol=1e-3, atol=1e-4)


def test_a_smaller_rank_has_the_nearest_updates(build, make_file, capsys):
    path, lora = make_file(rank=3)
    task = build("lora.rank=2", "lora.alpha=7", f"lora.init_from={path}")
    said = re.search(r"rank 3, lora.rank=2 keeps all but (.*)% of", capsys.readouterr().out)
    base, found = base_weights(task), weights(task)
    lost = total = 0
    for name, update in lora.items():
        delta = update.delta_weight()
        u, s, v = torch.linalg.svd(delta)
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        own = (found[name] - base[name]).flatten(1)
        torch.testing.assert_close(own, nearest, rtol=1e-3, atol=1e-4)
        lost, total = lost + s[2:].square().sum(), total + s.square().sum()
    assert float(said[1]) == pytest.approx(100 * (lost / total).sqrt().item(), abs=0.01)


@pytest.mark.parametrize("dora", [True, False])
def test_dora_starts_from_dora_and_from_plain_lora(build, make_file, dora):
    path, lora = make_file(dora=dora)
    task = build("lora.use_dora=true", "lora.rank=4", f"lora.init_from={path}")
    base = base_weights(task)
    for name, layer in adapted_layers(task.family, ()):
        torch.testing.assert_close(
            layer.get_base_layer().weight + layer.get_delta_weight("default"),
            base[name] + lora[name].delta_weight().view_as(base[name]),
        )
        magnitude = layer.lora_magnitude_vector["default"].weight
        updated = base[name] + lora[name].delta_weight().view_as(base[name])
        wanted = lora[name].magnitude if dora else updated.flatten(1).norm(dim=1)
        torch.testing.assert_close(magnitude.detach().flatten(), wanted)
        assert magnitude.requires_grad


def test_text_encoders_start_from_the_file_too(build, make_file):
    path, lora = make_file("train.train_text_encoder=true")
    assert any(name.startswith("text_encoder.") for name in lora)
    options = ("train.train_text_encoder=true", "lora.rank=3", f"lora.init_from={path}")
    assert_starts_as(build(*options), lora)


def test_a_peft_folder_will_do(build, make_file):
    path, lora = make_file(format=peft_format)
    assert_starts_as(build("lora.rank=3", f"lora.init_from={path}"), lora)


def test_layers_that_the_file_does_not_have_start_anew(build, make_file, capsys):
    path, lora = make_file(drop=["to_q", "to_k"])
    task = build("lora.rank=3", f"lora.init_from={path}")
    assert_starts_as(task, lora)
    assert re.search(
        r"has nothing for unet\..*to_.* more: they start anew", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("made_with", "options", "message"),
    [
        ((), ["lora.target_modules=[to_q]"], r"does not train, in unet: .*to_k.* and \d+ more"),
        (
            ("train.train_text_encoder=true",),
            [],
            r"does not train, in text_encoder: .*train.train_text_encoder",
        ),
    ],
)
def test_layers_that_the_run_does_not_train_are_named(
    build, make_file, made_with, options, message
):
    path, _ = make_file(*made_with)
    with pytest.raises(UserError, match=message):
        build(*options, f"lora.init_from={path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.rank=8"], "is DoRA: set lora.use_dora: true"),
        (["lora.rank=2", "lora.use_dora=true"], "set lora.rank: 3 or more"),
    ],
)
def test_dora_that_does_not_fit_is_refused(build, make_file, options, message):
    path, _ = make_file(dora=True)
    with pytest.raises(UserError, match=message):
        build(*options, f"lora.init_from={path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.safetensors", "no such file or folder: gone.safetensors"),
        ("./gone", "no such file or folder"),
        ("a/b/c@4", "no such file or folder"),
        ("https://huggingface.co/me/mine", "is an address: write me/mine"),
        ("' '", "must not be empty"),
    ],
)
def test_what_cannot_be_a_lora_is_told_by_the_config(settings, source, message):
    with pytest.raises(UserError, match=message):
        settings(f"lora.init_from={source}")


def test_a_run_does_not_start_from_itself(settings, tmp_path):
    for source in (tmp_path / "run", f"{tmp_path}/run@4"):
        with pytest.raises(UserError, match="is this run's own folder"):
            settings(f"lora.init_from={source}")


def test_runs_go_from_run_to_run_and_the_start_is_compared(settings, tmp_path, capsys):
    first = settings("train.max_train_steps=2", "checkpoint.checkpointing_steps=1")
    run(first)
    options = [f"output_dir={tmp_path}/second", "train.max_train_steps=1"]
    second = settings(*options, f"lora.init_from={first.output_dir}@1")
    run(second)
    card = (second.output_dir / "README.md").read_text()
    manifest, files = read_checkpoint(second.output_dir / "checkpoints/step-000001")
    digest = manifest["facts"]["initial LoRA"]
    kept = first.output_dir / "checkpoints/step-000001" / WEIGHT_NAME
    assert digest == initial.read_digest(kept)
    assert f"a LoRA that is not public; sha256 {digest[:16]}" in card
    assert str(tmp_path) not in card + str(files.keys())
    # the same file from elsewhere is the same run, and another file is not
    shutil.copy(kept, tmp_path / "moved.safetensors")
    run(settings(*options, f"lora.init_from={tmp_path}/moved.safetensors"))
    for start in (f"lora.init_from={first.output_dir}", "lora.init_from=null"):
        with pytest.raises(UserError, match=rf"another LoRA, was sha256 {digest[:16]}, is "):
            run(settings(*options, start))


def test_a_repository_on_the_hub_is_downloaded_and_named(build, make_file, tmp_path, monkeypatch):
    path, lora = make_file()
    with serving(tmp_path, monkeypatch):
        HfApi().create_repo("me/mine")
        HfApi().upload_file(path_or_fileobj=path, path_in_repo=WEIGHT_NAME, repo_id="me/mine")
        task = build("lora.rank=3", "lora.init_from=me/mine")
        assert_starts_as(task, lora)
        HfApi().create_repo("me/empty")
        with pytest.raises(UserError, match=r"me/empty, and pytorch_lora_weights.*another name"):
            build("lora.init_from=me/empty")


def test_offline_the_message_has_the_command_to_download(build):
    with pytest.raises(UserError, match=rf"hf download me/gone {WEIGHT_NAME}"):
        build("lora.init_from=me/gone")
