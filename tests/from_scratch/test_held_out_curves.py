"""Each trainer measures on held-out pictures as it goes, and learns no less and no more for it."""

import pytest
import torch
from PIL import Image

from tests.shared.runs import read_metrics
from tests.shared.small_runs import figures, weights
from trainers.config import loading
from trainers.run import run
from trainers.run_folder import BEST, MODEL, read_best

EXPECTED = {
    "autoencoder": ["held_out_psnr", "held_out_ssim"],
    "gan": ["held_out_kid", "held_out_precision", "held_out_recall"],
    "segment": ["held_out_dice", "held_out_iou", "held_out_pixel_error"],
    "pix2pix": ["held_out_psnr", "held_out_ssim"],
}
SHORT = ("train.max_train_steps=4", "checkpoint.checkpointing_steps=4")


@pytest.mark.parametrize("kind", EXPECTED)
def test_measuring_changes_nothing_and_keeps_the_best_weights(make, kind, measured_quickly):
    plain = make(kind, "plain", *SHORT)
    config = make(kind, "measured", *SHORT, "validation.validation_steps=2")
    run(plain)
    run(config)
    assert all(tensor.equal(weights(plain)[name]) for name, tensor in weights(config).items())
    rows = [row for row in read_metrics(config) if "validation_seconds" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert [name for name in sorted(row) if name.startswith("held_out")] == EXPECTED[kind]
    record = read_best(config.output_dir / BEST)
    assert record["metric"] == EXPECTED[kind][0]
    values = {row["step"]: row[record["metric"]] for row in rows}
    choose = min if kind == "gan" else max
    assert values[record["step"]] == choose(values.values())
    assert (config.output_dir / BEST / MODEL / "config.json").is_file()
    assert not (plain.output_dir / BEST).exists()


def test_all_held_out_pictures_give_the_figure_of_the_end(make, measured_quickly):
    config = make(
        "segment",
        "all",
        *SHORT,
        "validation.validation_steps=4",
        "validation.held_out_pictures=1000",
    )
    run(config)
    found = read_metrics(config)[-1]["held_out_dice"]
    assert found == pytest.approx(figures(config)["dice_1"], rel=1e-6)


def test_a_run_that_only_learns_its_pictures_by_heart_is_ended(tmp_path):
    """Noise has nothing in common with other noise: what is learnt of it can only do harm."""
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(0, 256, (16, 16), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "config.yaml").write_text(
        f"""
kind: autoencoder
output_dir: {tmp_path}/run
model: {{width: 16, latent_dim: 16}}
data: {{image_dir: {tmp_path}, folds: 2, resolution: 16}}
optimizer: {{learning_rate: 3e-3}}
train: {{max_train_steps: 400, train_batch_size: 4, early_stop: {{patience: 3}}}}
validation: {{validation_steps: 10}}
tracking: {{report_to: []}}
"""
    )
    config = loading.load_config(tmp_path / "config.yaml")
    run(config)
    rows = read_metrics(config)
    best = read_best(config.output_dir / BEST)["step"]
    assert rows[-1]["step"] == best + 30 < 400
    held_out = {row["step"]: row["held_out_psnr"] for row in rows}
    assert held_out[best] == max(held_out.values())
    assert rows[-1]["autoencoder_loss"] < rows[0]["autoencoder_loss"]
