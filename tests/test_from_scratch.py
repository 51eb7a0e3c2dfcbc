"""Laws of every trainer of small networks: resuming, kill -9, processes, accumulation, folds,
seeds, Hub, scripts."""

import json
import re
import shutil
import signal
import time
from functools import cache, partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from oracles import assert_trained_alike
from PIL import Image
from processes import call, launch, start
from safetensors.torch import load_file

from trainers import gan
from trainers.config import loading
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.classifier import train_classifier
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.networks import ConvAutoencoder, UNet
from trainers.run import TASKS, run

KINDS = {
    "autoencoder": "kind=autoencoder use=denoise model.latent_dim=4 data.resolution=16 "
    "data.random_flip=true",
    "gan": "kind=gan data.resolution=28 model.latent_dim=4 model.spectral_norm=true "
    "model.conditional=true "
    "objective.augment=[color,translation,cutout] objective.r2=0.5 objective.penalty_every=3 "
    "objective.generator_every=2 train.train_batch_size=8",
    "segment": "kind=unet use=segment data.crop=true data.elastic=2 data.random_flip=true "
    "data.random_rotate=true "
    "data.random_vertical_flip=true",
    "pix2pix": "kind=unet use=pix2pix data.target_suffix=_target data.channels=3 "
    "data.random_flip=true",
}


@pytest.fixture(scope="module")
def make(bars, blobs, tmp_path_factory):
    """A function: kind, name of the run, overrides -> Config of a run of twelve steps with a
    checkpoint every third.

    Adam's epsilon is large: biases before a norm have no gradient but rounding errors, which it
    else makes steps of.
    """
    root = tmp_path_factory.mktemp("runs")
    (root / "config.yaml").write_text(
        """
model: {width: 8}
optimizer: {learning_rate: 3e-3, eps: 1e-3}
train: {max_train_steps: 12, train_batch_size: 4, ema_decay: 0.9}
checkpoint: {checkpointing_steps: 3}
tracking: {report_to: [], log_every: 1}
"""
    )
    lone = [f"data.dataset_name={bars}"]
    pairs = [f"data.image_dir={blobs}", "data.folds=4", "data.resolution=16", "model.levels=2"]
    sources = {
        "autoencoder": lone,
        "gan": [*lone, "data.label_column=label"],
        "segment": pairs,
        "pix2pix": pairs,
    }

    def settings(kind, name, *overrides):
        first = [*KINDS[kind].split(), *sources[kind], f"output_dir={root}/{kind}-{name}"]
        return loading.load_config(root / "config.yaml", [*first, *overrides])

    return settings


def measure_quickly(patch=setattr):
    """A GAN's figures need a classifier; one of a few steps will do."""
    patch(gan, "train_classifier", partial(train_classifier, steps=3))


@pytest.fixture(autouse=True, scope="module")
def measured_quickly():
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch.setattr)
        yield


@pytest.fixture(scope="module")
def undisturbed(make):
    """A function: kind -> settings of a finished run."""

    @cache
    def finished(kind):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = make(kind, "whole")
        run(settings)
        return settings

    return finished


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def whole(kind, undisturbed):
    return undisturbed(kind)


def state(settings):
    """Every tensor of the last checkpoint: all players' weights, buffers, averages and
    optimisers."""
    folder, tensors = max((settings.output_dir / "checkpoints").iterdir()), {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("*.pt")):
        for i, moments in torch.load(path)["state"].items():
            tensors |= {f"{path.name} {i} {name}": tensor for name, tensor in moments.items()}
    return tensors


def weights(settings):
    return {name: tensor for name, tensor in state(settings).items() if "optimizer" not in name}


def losses(settings):
    rows = [
        json.loads(line)
        for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [{name: value for name, value in row.items() if name.endswith("_loss")} for row in rows]


def figures(settings):
    return json.loads((settings.output_dir / "figures.json").read_text())


def assert_same(one, other):
    """To the bit."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(one) == losses(other)
    assert figures(one) == figures(other)


def assert_close(one, other):
    assert_trained_alike(
        (losses(one), losses(other)), (weights(one), weights(other)), one.optimizer.learning_rate
    )


def written(settings, path):
    path.write_text(loading.dump_config(settings))
    return path


def test_a_checkpoint_has_every_player_and_what_they_remember(kind, whole):
    players = {
        "autoencoder": {"autoencoder"},
        "gan": {"generator", "discriminator"},
        "segment": {"unet"},
        "pix2pix": {"unet", "discriminator"},
    }
    assert {name.split(".")[0] for name in state(whole)} == players[kind]
    assert {name.split(".")[0] for name in state(whole) if ".ema." in name} == players[kind] - {
        "discriminator"
    }
    assert any(name.endswith("._u") for name in state(whole)) == (kind == "gan")


def test_stopping_and_going_on_equals_one_run(kind, make, whole):
    parts = make(kind, "stopped")
    run(parts.model_copy(update={"train": parts.train.model_copy(update={"max_train_steps": 7})}))
    run(parts)
    assert_same(whole, parts)


def test_a_run_goes_on_when_its_pictures_lie_elsewhere_and_are_not_kept_in_memory(
    make, undisturbed, blobs, tmp_path
):
    whole, moved = undisturbed("pix2pix"), shutil.copytree(blobs, tmp_path / "moved")
    parts = make("pix2pix", "moved", "train.max_train_steps=7")
    run(parts)
    run(make("pix2pix", "moved", f"data.image_dir={moved}", "data.in_memory=false"))
    assert_same(whole, parts)


def test_kill_9_and_the_same_command_give_the_same_weights(kind, make, whole, tmp_path):
    killed, log = make(kind, "killed", "checkpoint.checkpointing_steps=1"), tmp_path / "log"
    command = partial(
        start,
        "train.py",
        written(killed, tmp_path / "killed.yaml"),
        log=log,
        before=measure_quickly,
    )
    process, checkpoints = command(), killed.output_dir / "checkpoints"
    while (
        process.is_alive()
        and max((path.name for path in checkpoints.glob("step-*")), default="") < "step-000003"
    ):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed.output_dir / "model").exists()
    again = command()
    again.join()
    assert again.exitcode == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert_same(whole, killed)


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one_with_their_batches_together(
    kind, make, whole, tmp_path, world
):
    unmeasured = ["data.test_split=null"] if kind == "gan" else []
    parts = make(
        kind,
        f"of-{world}",
        f"train.train_batch_size={whole.train.train_batch_size // world}",
        *unmeasured,
    )
    statuses = launch(
        "train.py", written(parts, tmp_path / "parts.yaml"), log=tmp_path / "log", processes=world
    )
    assert statuses == [0] * world, (tmp_path / "log.0").read_text()
    assert_close(parts, whole)


def test_two_processes_measure_a_gan_with_a_classifier(make, tmp_path):
    """Which the first one trains, while the other waits."""
    two = make("gan", "two-measured", "train.max_train_steps=1")
    command = ("train.py", written(two, tmp_path / "two.yaml"))
    statuses = launch(*command, log=tmp_path / "log", processes=2, before=measure_quickly)
    assert statuses == [0, 0], (tmp_path / "log.0").read_text()
    assert figures(two)["kid"] > 0


def test_accumulation_equals_one_batch_or_is_refused(kind, make, whole):
    quarters = ("train.train_batch_size=1", "train.gradient_accumulation_steps=4")
    if kind in ("gan", "pix2pix"):
        with pytest.raises(UserError, match=r"train.gradient_accumulation_steps: must be 1"):
            make(kind, "accumulated", *quarters)
        return
    accumulated = make(kind, "accumulated", *quarters)
    run(accumulated)
    assert_close(accumulated, whole)


def test_pictures_decoded_at_each_step_give_the_same_training(kind, make, whole):
    lazy = make(kind, "lazy", "data.in_memory=false")
    run(lazy)
    assert_same(whole, lazy)


def test_a_seed_decides_the_first_weights_and_the_pictures_and_another_decides_otherwise(
    kind, make
):
    starts = []
    for seed in (0, 0, 1):
        task, batches, _ = TASKS[make(kind, "seed").kind](
            make(kind, "seed", f"seed={seed}"), Accelerator(cpu=True)
        )
        (batch, rng), *_ = batches(0)
        players = [
            parameter
            for player in task.players.values()
            for parameter in player.module.parameters()
        ]
        starts.append(
            [torch.cat([p.flatten() for p in players]), batch["pixels"], rng.normal((4, 3))]
        )
    one, again, other = starts
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("source", ["autoencoder", "segment"])
def test_each_picture_is_held_out_by_one_fold_and_learnt_from_in_the_others(make, blobs, source):
    pairs = source == "segment"
    lone = ["data.dataset_name=null", f"data.image_dir={blobs}", "data.folds=4"]
    everything = sorted(str(path) for path in blobs.glob("*_image.png" if pairs else "*.png"))
    held_out = []
    for fold in range(4):
        data = make(source, "folds", *([] if pairs else lone), f"data.fold={fold}").data
        both = (
            load_images(data, "cpu", part, Picture.decode if pairs else None)
            for part in (False, True)
        )
        train_images, held = ([sample.picture.name for sample in images.samples] for images in both)
        assert sorted(train_images + held) == everything
        held_out += held
    assert sorted(held_out) == everything


def test_what_is_pushed_loads_and_runs_by_the_lines_of_its_card(kind, whole, local_hub):
    run(whole.model_copy(update={"hub": whole.hub.model_copy(update={"push_to_hub": True})}))
    name = f"me/{whole.output_dir.name}"
    public = {
        path.relative_to(local_hub / name).as_posix() for path in (local_hub / name).rglob("*.*")
    }
    assert public >= {
        "README.md",
        "config.yaml",
        "figures.json",
        "model/config.json",
        "samples/final/grid.png",
    }
    assert not any("checkpoint" in path or path == "metrics.jsonl" for path in public)
    text = (local_hub / name / "README.md").read_text()
    assert ModelCard(text).data.tags == [whole.kind, "diffusion-trainers"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    side, noise = whole.data.resolution, kind == "pix2pix"
    scope = {"torch": torch, "x": torch.zeros(10, whole.data.channels + noise, side, side)}
    exec(code.replace("PATH_OR_REPO", name), scope)
    ours, theirs = (
        scope["model"].state_dict(),
        type(scope["model"]).from_pretrained(whole.output_dir / "model"),
    )
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.state_dict().items())


def test_encode_gives_the_models_own_codes_and_errors_of_pictures_of_any_size(
    undisturbed, blobs, tmp_path
):
    run_folder = undisturbed("autoencoder").output_dir
    Image.new("RGB", (9, 5), "red").save(tmp_path / "small.jpg")
    assert (
        call(
            "encode.py", run_folder, blobs, tmp_path / "small.jpg", "--out", tmp_path / "codes.npz"
        )
        == 0
    )
    assert (
        call(
            "encode.py",
            run_folder,
            blobs,
            tmp_path / "small.jpg",
            "--out",
            tmp_path / "codes.parquet",
        )
        == 0
    )
    npz, rows = (
        np.load(tmp_path / "codes.npz"),
        datasets.Dataset.from_parquet(str(tmp_path / "codes.parquet")),
    )
    paths = [*sorted(blobs.glob("*.png")), tmp_path / "small.jpg"]
    small = [
        Image.open(path).convert("RGB").convert("L").resize((16, 16), Image.Resampling.LANCZOS)
        for path in paths
    ]
    x = torch.from_numpy(np.stack(small)).float()[:, None] / 127.5 - 1
    model = ConvAutoencoder.from_pretrained(run_folder / "model")
    with torch.no_grad():
        codes = model.encode(x)
        errors = ((model.decode(codes).clamp(-1, 1) - x) / 2).square().flatten(1).mean(1)
    assert npz["name"].tolist() == rows["name"] == [str(path) for path in paths]
    for table in (npz, rows.with_format("numpy")):
        np.testing.assert_allclose(np.stack(table["code"]), codes, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(table["score"], errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["segment", "pix2pix"])
def test_translate_gives_a_picture_of_the_size_of_each_whatever_that_is(
    kind, undisturbed, tmp_path
):
    settings, sizes, rng = (
        undisturbed(kind),
        [(5, 9), (16, 16), (16, 40), (33, 47)],
        np.random.default_rng(0),
    )
    (tmp_path / "in").mkdir()
    for width, height in sizes:
        array = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"in/{width}x{height}.png")
    assert (
        call("translate.py", settings.output_dir, tmp_path / "in", "--out", tmp_path / "out") == 0
    )
    results = {path.name: Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert {name: image.size for name, image in results.items()} == {
        f"{w}x{h}.png": (w, h) for w, h in sizes
    }
    given = Image.open(tmp_path / "in/16x16.png").convert("L" if kind == "segment" else "RGB")
    x = (
        torch.from_numpy(np.array(given)).reshape(16, 16, -1).permute(2, 0, 1)[None].float() / 127.5
        - 1
    )
    noise = [SampleRng(settings.seed, -1, [0]).normal((1, 1, 16, 16))] if kind == "pix2pix" else []
    with torch.no_grad():
        y = UNet.from_pretrained(settings.output_dir / "model")(torch.cat([x, *noise], 1))[0]
    wanted = (
        255 * y.argmax(0)
        if kind == "segment"
        else ((y.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    )
    np.testing.assert_allclose(
        np.asarray(results["16x16.png"]), wanted, atol=0 if kind == "segment" else 1
    )


def test_a_finished_run_translates_when_its_data_are_gone(undisturbed, blobs, tmp_path):
    settings = undisturbed("segment")
    shutil.copytree(settings.output_dir / "model", tmp_path / "run/model")
    gone = settings.data.model_copy(update={"image_dir": tmp_path / "gone"})
    written(settings.model_copy(update={"data": gone}), tmp_path / "run/config.yaml")
    outs = {name: tmp_path / name for name in ("here", "gone")}
    for folder, out in zip((settings.output_dir, tmp_path / "run"), outs.values(), strict=True):
        assert call("translate.py", folder, blobs / "0_image.png", "--out", out) == 0
    assert (outs["here"] / "0_image.png").read_bytes() == (
        outs["gone"] / "0_image.png"
    ).read_bytes()


def test_translate_keeps_the_results_of_pictures_of_one_name_apart(undisturbed, tmp_path):
    for place, color in (("a", "black"), ("b", "white")):
        (tmp_path / place).mkdir()
        Image.new("RGB", (16, 16), color).save(tmp_path / place / "1.png")
    status = call(
        "translate.py",
        undisturbed("pix2pix").output_dir,
        tmp_path / "a",
        tmp_path / "b",
        "--out",
        tmp_path,
    )
    results = len(list(tmp_path.glob("*.png")))
    assert status == 2 or results == 2, "the second 1.png silently replaced the result of the first"


@pytest.mark.parametrize("script", ["encode.py", "translate.py"])
@pytest.mark.parametrize(
    "case", ["wrong kind", "no run", "no model", "no picture", "broken picture"]
)
def test_a_mistake_is_one_message_and_exit_status_2(script, case, undisturbed, tmp_path, capsys):
    right, wrong = (
        ("autoencoder", "segment") if script == "encode.py" else ("segment", "autoencoder")
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "unfinished").mkdir()
    written(undisturbed(right), tmp_path / "unfinished/config.yaml")
    finished = undisturbed(right).output_dir
    run_folder, picture, wanted = {
        "wrong kind": (undisturbed(wrong).output_dir, "picture.png", "is a run of"),
        "no run": (tmp_path, "picture.png", "is no run folder"),
        "no model": (tmp_path / "unfinished", "picture.png", "unfinished"),
        "no picture": (finished, "missing.png", "missing.png is no picture"),
        "broken picture": (finished, "broken.png", "broken.png is not a readable picture"),
    }[case]
    status = call(script, run_folder, tmp_path / picture, "--out", tmp_path / "out.npz")
    *progress, message = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert wanted in message
    assert all("%|" in line for line in progress)


@pytest.mark.parametrize("name", ["new/codes.npz", "codes"])
def test_encode_writes_the_file_that_it_names(undisturbed, blobs, tmp_path, capsys, name):
    out = tmp_path / name
    assert call("encode.py", undisturbed("autoencoder").output_dir, blobs, "--out", out) == 0
    assert Path(capsys.readouterr().out.split(":")[0]).exists()


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("data set", "data.folds=4"),
        ("data set", "data.fold=1"),
        ("folder", "data.label_column=label"),
    ],
)
def test_keys_that_mean_nothing_to_a_source_of_pictures_are_refused(make, blobs, source, key):
    folder = ["data.dataset_name=null", f"data.image_dir={blobs}"] if source == "folder" else []
    with pytest.raises(UserError, match=key.partition("=")[0]):
        make("autoencoder", "foreign", *folder, key)
