"""Out of memory: smaller parts train as the whole batch, or the message lists what helps."""

import pytest
import torch

from tests.shared.disturbed_runs import checkpoint, metrics, state, until
from trainers.errors import RunFailedError, UserError
from trainers.families.trainable import TrainableDenoiser
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.run import run


def limit(monkeypatch, rows, model=TrainableDenoiser):
    """More rows than these are out of memory."""
    plain = model.forward

    def forward(self, x, *inputs):
        if len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return plain(self, x, *inputs)

    monkeypatch.setattr(model, "forward", forward)


FOUR, AUTO = "train.train_batch_size=4", "train.auto_micro_batch=true"


@pytest.mark.parametrize("auto", [False, True])
def test_out_of_memory_lists_what_helps_the_cheapest_first(make, monkeypatch, auto):
    limit(monkeypatch, 0)
    with pytest.raises(
        RunFailedError, match=r"(?s)^out of memory \(CUDA .*There is no checkpoint yet"
    ) as message:
        run(make(FOUR, f"train.auto_micro_batch={auto}", "data.resolution=80"))
    remedies = [
        line.split(":")[0].strip()
        for line in str(message.value).splitlines()
        if line.startswith("  ")
    ]
    wanted = [AUTO, *(f"train.gradient_checkpointing={kind}" for kind in ("selective", "true"))]
    wanted.append("--config_file accelerate_configs/fsdp2.yaml")
    assert remedies == [*wanted[auto:], "model.quantization=nf4", "data.resolution=48"]
    assert message.value.status == 1


@pytest.mark.parametrize(
    ("kind", "batch", "rows", "parts"),
    [
        ("dreambooth", 4, 3, "2, 2"),
        pytest.param("dreambooth", 4, 1, "1, 4", marks=pytest.mark.slow),
        ("dreambooth", 3, 2, "1, 3"),
        ("autoencoder", 4, 2, "2, 2"),
        pytest.param("dreambooth", 2, 2, "2, 1", marks=pytest.mark.slow),
    ],
)
def test_smaller_parts_that_fit_train_as_the_whole_batch(
    make, monkeypatch, capsys, kind, batch, rows, parts
):
    """Also when it is resumed; the rehearsal of a batch that fits leaves all as it was."""
    loss = "denoiser_loss" if kind == "dreambooth" else "autoencoder_loss"
    shared = (f"train.train_batch_size={batch}", "train.ema_decay=0.9", "optimizer.eps=1e-3")
    whole, settings = make(*shared, kind=kind), make(*shared, AUTO, kind=kind)
    run(whole)
    limit(monkeypatch, rows, TrainableDenoiser if kind == "dreambooth" else ConvAutoencoder)
    run(until(settings, 3))
    run(settings)
    assert capsys.readouterr().out.count(f"micro-batches of {parts} for each step") == 2
    ours, theirs = (
        state(checkpoint(each, 6)) | {"loss": torch.tensor(list(metrics(each, loss).values()))}
        for each in (settings, whole)
    )
    exact = {"rtol": 0, "atol": 0} if rows == batch else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **exact)


def test_players_that_take_turns_cannot_train_on_a_batch_in_parts(make):
    with pytest.raises(
        UserError,
        match=r"train.auto_micro_batch: must be false: the discriminator "
        "has to take its optimizer step",
    ):
        make(AUTO, kind="gan")
