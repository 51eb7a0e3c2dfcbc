"""A run for anomalies: what it tells from good pictures, where, and from which score on."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from tests.shared.processes import call, launch
from tests.shared.small_runs import figures, state, written
from trainers.config import loading
from trainers.data.imaging import to_float
from trainers.data.intake import Intake
from trainers.errors import UserError
from trainers.from_scratch.anomaly_verdicts import Judge
from trainers.from_scratch.defects import decode_defect, list_defects
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.patch_memory import PatchMemory, farthest_points, patch_features
from trainers.metrics.anomalies import per_region_overlap
from trainers.run import run
from trainers.run_folder import read_metrics


@pytest.fixture(scope="module")
def settings(parts, tmp_path_factory):
    """A function: name of the run, overrides -> Config of a short run on the folder of parts."""
    root = tmp_path_factory.mktemp("anomalies")
    (root / "config.yaml").write_text(
        f"""
kind: autoencoder
use: anomaly
model: {{latent_dim: 4, width: 8}}
data: {{image_dir: {parts}, resolution: 16}}
optimizer: {{learning_rate: 3e-3}}
train: {{max_train_steps: 12, train_batch_size: 8}}
validation: {{validation_steps: 6, bank_size: 50}}
checkpoint: {{checkpointing_steps: 6}}
tracking: {{report_to: []}}
"""
    )

    def load(name, *overrides):
        return loading.load_config(root / "config.yaml", [f"output_dir={root / name}", *overrides])

    return load


@pytest.fixture(scope="module")
def finished(settings):
    config = settings("finished")
    run(config)
    return config


def blocks_of(*sizes, count=200):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(count, size, generator=rng) for size in sizes]


def read_tiff(path):
    with Image.open(path) as picture:
        return np.array(picture)


def test_defects_are_told_from_good_pictures_by_kind_and_place(finished):
    found = figures(finished)
    endings = ("", "_line", "_spot")
    names = [f"{name}{ending}" for ending in endings for name in ("auroc", "pixel_auroc", "pro")]
    assert all(found[name] > 0.85 for name in names)
    rows = [row for row in read_metrics(finished.output_dir) if "held_out_auroc" in row]
    assert [(row["step"], row["held_out_auroc"] > 0.9) for row in rows] == [(6, True), (12, True)]
    assert (finished.output_dir / "samples/final/grid.png").is_file()
    assert (finished.output_dir / "best/model/anomaly.safetensors").is_file()


def test_encode_gives_the_figures_of_the_run(finished, parts, tmp_path):
    out = tmp_path / "codes.npz"
    assert call("encode.py", finished.output_dir, parts / "test", "--out", out) == 0
    table, found = np.load(out), figures(finished)
    kinds = [name.split("/")[-2] for name in table["name"]]
    is_bad = np.array(kinds) != "good"
    assert roc_auc_score(is_bad, table["score"]) == pytest.approx(found["auroc"], abs=1e-3)
    assert table["is_strange"][is_bad].mean() == pytest.approx(found["found"], abs=1e-3)
    # one of six good pictures is above the .99 quantile of their scores
    assert table["is_strange"][~is_bad].sum() == 1
    maps, masks = [], []
    for kind in ("good", "line", "spot"):
        for path in sorted((parts / "test" / kind).iterdir()):
            maps.append(read_tiff(tmp_path / "codes_maps" / kind / f"{path.stem}.tiff"))
            mask = parts / "ground_truth" / kind / f"{path.stem}_mask.png"
            masks.append(read_tiff(mask) > 0 if kind != "good" else np.zeros((16, 16), bool))
    maps, masks = np.stack(maps), np.stack(masks)
    pixels = roc_auc_score(masks.ravel(), maps.ravel())
    assert pixels == pytest.approx(found["pixel_auroc"], abs=1e-3)
    overlap = per_region_overlap(torch.from_numpy(maps), torch.from_numpy(masks))
    assert overlap == pytest.approx(found["pro"], abs=1e-3)


def test_heat_maps_have_the_size_of_their_pictures(finished, tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "other.jpg")
    out = tmp_path / "new/codes"
    assert call("encode.py", finished.output_dir, tmp_path / "other.jpg", "--out", out) == 0
    for name in ("other.png", "other.tiff"):
        with Image.open(tmp_path / "new/codes_maps" / name) as picture:
            assert picture.size == (40, 24)


def test_a_run_that_was_stopped_tells_the_same_to_the_bit(settings, finished):
    parts = settings("stopped", "train.max_train_steps=6", "checkpoint.extend=true")
    run(parts)
    run(settings("stopped", "checkpoint.extend=true"))
    assert figures(finished) == figures(parts)
    files = [config.output_dir / "model/anomaly.safetensors" for config in (finished, parts)]
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_two_processes_tell_what_one_tells(settings, finished, tmp_path):
    two = settings("two", "train.train_batch_size=4")
    command = ("train.py", written(two, tmp_path / "two.yaml"))
    assert launch(*command, log=tmp_path / "log", processes=2) == [0, 0]
    for name, tensor in state(finished).items():
        torch.testing.assert_close(state(two)[name], tensor, rtol=1e-3, atol=1e-4)
    for name, value in figures(finished).items():
        if name != "threshold_note":
            assert figures(two)[name] == pytest.approx(value, abs=0.02)


def test_the_threshold_is_the_quantile_of_good_scores_and_is_kept(finished):
    folder = finished.output_dir / "model"
    model = ConvAutoencoder.from_pretrained(folder)
    judge = Judge.load(folder, model, finished)
    good = load_images(finished.data, "cpu", held_out=True)
    scores = judge.scorer.scores(judge.scorer.maps(to_float(good.pixels)))
    torch.testing.assert_close(judge.good_scores, scores.sort().values)
    assert figures(finished)["threshold"] == pytest.approx(np.quantile(scores, 0.99), rel=1e-5)
    assert "0.99 quantile of the scores of 6 held-out" in figures(finished)["threshold_note"]


@pytest.mark.parametrize("scorer", ["patches", "reconstruction"])
def test_without_held_out_pictures_there_is_a_score_and_no_verdict(
    settings, parts, tmp_path, capsys, scorer
):
    config = settings(
        f"bare-{scorer}",
        f"data.image_dir={parts / 'train'}",
        f"validation.scorer={scorer}",
        *(["validation.bank_size=1000"] if scorer == "reconstruction" else []),
        "train.max_train_steps=1",
    )
    run(config)
    out = tmp_path / "codes.npz"
    assert call("encode.py", config.output_dir, parts / "test/line", "--out", out) == 0
    assert "no verdict: the threshold is none: no good pictures are held out" in (
        capsys.readouterr().out
    )
    assert sorted(np.load(out)) == ["code", "name", "score"]


# Patches


def test_each_kept_point_is_the_farthest_from_those_before():
    points = blocks_of(3)[0]
    chosen = farthest_points(points, 20).tolist()
    distances = torch.cdist(points.double(), points.double())
    for i in range(1, 20):
        assert chosen[i] == int(distances[chosen[:i]].min(0).values.argmax())
    assert len(farthest_points(points, 300)) == 200


def test_a_distance_is_to_the_nearest_good_patch_in_each_block():
    """Relative to what is usual there: a block of large numbers counts like another."""
    blocks = blocks_of(3, 5)
    expected = 0
    for block in blocks:
        bank = NearestNeighbors().fit(block.numpy())
        usual = bank.kneighbors(block.numpy(), 2)[0][:, 1].mean()
        expected = expected + bank.kneighbors(2 * block.numpy() + 1, 1)[0][:, 0] / usual / 2
    for factor in (1, 1000):
        scaled = [blocks[0], factor * blocks[1]]
        memory = PatchMemory.build(scaled, 200)
        others = [2 * scaled[0] + 1, 2 * scaled[1] + factor]
        found = memory.distances([block.view(2, 10, 10, -1) for block in others])
        np.testing.assert_allclose(found.flatten(), expected, rtol=1e-3)


@pytest.mark.parametrize("size", [8, 28, 40, 64])
def test_there_is_a_patch_for_four_by_four_pixels_whatever_the_size(size):
    model = ConvAutoencoder(1, size, 8, 4, False)
    for block in patch_features(model, torch.zeros(2, 1, size, size)):
        assert block.shape[:3] == (2, size // 4, size // 4)


# Pictures with defects


def test_a_folder_of_defects_is_read_as_mvtecs_with_the_masks_that_it_has(
    settings, parts, tmp_path
):
    (tmp_path / "bad/chip").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "bad/chip/a.png")
    Image.new("L", (16, 16)).save(tmp_path / "bad/lone.png")
    both = []
    for bad_dir in (parts, parts / "test", tmp_path / "bad"):
        config = settings("read", f"data.bad_dir={bad_dir}")
        intake = Intake()
        samples, kinds = list_defects(config.data, intake)
        both.append((kinds, [bool(sample.target) for sample in samples]))
    assert both[0] == both[1] == (["line", "spot"], [True] * 8)
    assert both[2] == (["chip", "defect"], [False, False])
    assert "1 of chip, 1 without a mask" in intake.notes[0].text


def test_a_defect_thinner_than_a_pixel_is_where_most_of_it_is(settings, tmp_path):
    picture, mask = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    mask[9] = mask[32:44, 32:44] = 255
    for folder, array in (("bad/scratch", picture), ("ground_truth/scratch", mask)):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / folder / "1.png")
    config = settings("thin", f"data.bad_dir={tmp_path / 'bad'}").data
    (sample,), _ = list_defects(config, Intake())
    inside = decode_defect(sample, config)[1] > 0
    assert inside.nonzero().tolist() == [[y, x] for y in (8, 9, 10) for x in (8, 9, 10)]
    Image.fromarray(mask * (np.arange(64) < 20)[:, None]).save(
        tmp_path / "ground_truth/scratch/1.png"
    )
    assert (decode_defect(sample, config)[1] > 0).nonzero()[:, 0].unique().tolist() == [2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.bad_dir=/no/folder"], "data.bad_dir: no such folder"),
        (["data.folds=3"], "data.folds: .*good is held out already"),
        (["use=denoise", "data.bad_dir=PARTS"], "data.bad_dir: has no effect with denoise"),
        (["use=denoise", "validation.scorer=reconstruction"], "validation.scorer: has no effect"),
        (["validation.scorer=reconstruction"], "validation.bank_size: has no effect"),
        (["data.image_dir=PARTS/test", "data.bad_dir=PARTS/test/line"], "all learnt as good"),
        (
            [
                "data.image_dir=PARTS/train",
                "train.early_stop={metric: held_out_auroc, patience: 1}",
            ],
            "held_out_auroc needs data.folds.*; and data.bad_dir.*data.label_column",
        ),
    ],
)
def test_mistakes_are_one_message(settings, parts, overrides, message):
    with pytest.raises(UserError, match=message):
        settings("wrong", *(text.replace("PARTS", str(parts)) for text in overrides))


def test_a_mask_of_another_size_and_a_folder_without_defects_are_named(settings, tmp_path):
    (tmp_path / "bad/good").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "bad/good/1.png")
    config = settings("none", f"data.bad_dir={tmp_path / 'bad'}").data
    with pytest.raises(UserError, match=r"data.bad_dir: there is no picture with a defect"):
        list_defects(config, Intake())
    for folder, side in (("bad/chip", 16), ("ground_truth/chip", 20)):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (side, side), 255).save(tmp_path / folder / "1.png")
    (sample,), _ = list_defects(config, Intake())
    with pytest.raises(UserError, match="has not the size of its picture: 20 x 20, not 16 x 16"):
        decode_defect(sample, config)
