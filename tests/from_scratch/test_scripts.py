"""scripts/encode.py, scripts/translate.py, and the code of the model card, on finished runs."""

import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from tests.shared.processes import call
from tests.shared.small_runs import written
from trainers.data.rng import SampleRng
from trainers.from_scratch.networks import ConvAutoencoder, UNet
from trainers.run import run

pytestmark = pytest.mark.usefixtures("measured_quickly")


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
    # what the trainings said
    capsys.readouterr()
    status = call(script, run_folder, tmp_path / picture, "--out", tmp_path / "out.npz")
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert wanted in message


@pytest.mark.parametrize("name", ["new/codes.npz", "codes"])
def test_encode_writes_the_file_that_it_names(undisturbed, blobs, tmp_path, capsys, name):
    out = tmp_path / name
    assert call("encode.py", undisturbed("autoencoder").output_dir, blobs, "--out", out) == 0
    assert Path(capsys.readouterr().out.split(":")[0]).exists()
