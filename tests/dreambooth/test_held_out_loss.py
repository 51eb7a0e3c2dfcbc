"""The loss on held-out photos is repeatable and changes nothing that is trained."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from tests.shared.runs import held_out_losses, lora, losses
from trainers import dreambooth
from trainers.errors import UserError
from trainers.run import run


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
    (held_out,) = task.held_out.batches
    rows = list(held_out(0))
    errors = []
    for batch, rng in rows:
        x0 = task.family.latents(batch["moments"], rng)
        objective = task.objective(x0.shape[-2:])
        eps = objective.noise(x0, rng)
        t = objective.times(rng)
        with torch.no_grad():
            predicted = task.module(objective.corrupt(x0, eps, t), t, batch["text"])
        errors.append(F.mse_loss(predicted, eps))
    assert held_out_losses(still)[0] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert len(rows) == 8


def test_a_missing_held_out_folder_is_reported(settings, tmp_path):
    with pytest.raises(UserError, match=r"data\.held_out_dir: no such folder"):
        settings(f"data.held_out_dir={tmp_path}/nowhere")
