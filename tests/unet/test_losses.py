"""The losses of every use are those of their papers."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from tests.shared.oracles import check_each_players_step
from tests.shared.unets import draws, pixels, prepared
from trainers.data.rng import SampleRng
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.colorize import nearest_bin
from trainers.unet import UNetTask

VARIANTS = {
    "segment": ("segment", "objective.classes=3"),
    "colorize": ("colorize",),
    "rebalanced": ("colorize", "objective.rebalanced=true"),
    "pix2pix": ("pix2pix",),
    "restore": ("restore", "objective.downscale=2"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(settings, variant):
    """Or accumulation and several processes would not equal one batch."""
    use = prepared(settings(*variant))
    channels = {"segment": 4, "pix2pix": 6}.get(variant[0], 3)
    batch = pixels(4, channels, 16, 16)
    batch[:2, :3] //= 8  # dark, and so of other colours
    if variant[0] == "segment":
        batch[:, 3] %= 3
        batch[0, 3, :9] = 255
    _, y = use.pair(batch, draws(4))
    prediction = torch.randn(4, use.out_channels, 16, 16, generator=torch.manual_seed(0))
    halves = (use.loss(prediction[part], y[part]) for part in (slice(2), slice(2, 4)))
    torch.testing.assert_close(sum(halves) / 2, use.loss(prediction, y))


def test_the_loss_of_masks_is_cross_entropy_and_dice_of_what_is_known(settings):
    use = USES["segment"](settings("segment", "objective.classes=3", "objective.dice_weight=0.7"))
    y = torch.randint(3, (2, 16, 16), generator=torch.manual_seed(0))
    y[0, :5] = 255
    prediction = torch.randn(2, 3, 16, 16)
    share, known, dice = prediction.softmax(1), y != 255, []
    for i in range(2):
        for k in range(3):
            truth, ours = (y[i] == k)[known[i]].float(), share[i, k][known[i]]
            dice.append((2 * (truth * ours).sum() + 1) / (truth.sum() + ours.sum() + 1))
    entropy = sum(
        F.cross_entropy(prediction[i : i + 1], y[i : i + 1], ignore_index=255) for i in range(2)
    )
    expected = entropy / 2 + 0.7 * (1 - sum(dice) / len(dice))
    torch.testing.assert_close(use.loss(prediction, y), expected)


def test_what_is_to_be_ignored_changes_neither_loss_nor_gradient(settings):
    use = USES["segment"](settings("segment"))
    y = torch.randint(2, (2, 16, 16), generator=torch.manual_seed(0))
    y[:, 4:9] = 255
    prediction = torch.randn(2, 2, 16, 16, requires_grad=True)
    loss = use.loss(prediction, y)
    loss.backward()
    other = torch.where((y == 255)[:, None], torch.randn(2, 2, 16, 16), prediction)
    torch.testing.assert_close(use.loss(other, y), loss)
    assert (prediction.grad[:, :, 4:9] == 0).all()
    assert (prediction.grad[:, :, :4] != 0).all()
    assert torch.isfinite(use.loss(prediction, torch.full_like(y, 255)))


def test_a_perfect_mask_costs_nothing(settings):
    use = USES["segment"](settings("segment", "objective.classes=3"))
    y = torch.randint(3, (2, 16, 16), generator=torch.manual_seed(0))
    sure = 50.0 * F.one_hot(y, 3).movedim(3, 1)
    y[:, :2] = 255
    assert float(use.loss(sure, y)) == pytest.approx(0, abs=1e-5)
    assert torch.equal(use.postprocess(sure)[:, 2:], y[:, 2:])


def test_the_losses_of_pix2pix_are_its_papers(settings):
    """Both are told what is shown, the generator has noise too, and it faces the discriminator that
    has stepped."""
    task, batches, _ = UNetTask.build(
        settings("pix2pix", "objective.l1_weight=7"), Accelerator(cpu=True)
    )
    unet, critic = (task.players[name].module for name in ("unet", "discriminator"))
    (batch, rng), *_ = batches(0)
    x, y = (batch["pixels"] / 127.5 - 1).split(3, 1)
    generated = unet(torch.cat([x, SampleRng(0, 0, rng.rows).normal((4, 1, 16, 16))], 1))

    def score(picture):
        return critic(torch.cat([x, picture], 1))

    references = {
        "discriminator": lambda: (
            -F.logsigmoid(score(y)).mean() - F.logsigmoid(-score(generated)).mean()
        ),
        "unet": lambda: 7 * F.l1_loss(generated, y) - F.logsigmoid(score(generated)).mean(),
    }
    check_each_players_step(task, task.losses(batch, rng), references, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad for p in critic.parameters())


def test_the_loss_of_bins_is_cross_entropy_times_the_weight_of_the_true_one(settings):
    use = prepared(settings("colorize", "objective.rebalanced=true"))
    _, y = use.pair(pixels(4, 3, 16, 16), draws(4))
    prediction, true = torch.randn(4, use.out_channels, 16, 16), nearest_bin(y)
    share = prediction.log_softmax(1).gather(1, true[:, None])[:, 0]
    torch.testing.assert_close(use.loss(prediction, y), -(use.bin_weights[true] * share).mean())
