"""What a mask leaves out is not learnt, a white mask changes nothing, and its size changes no
scale."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.shared.by_hand import by_hand_but
from tests.shared.families import FLOWS
from tests.shared.runs import (
    PRIOR,
    assert_close,
    assert_same,
    first_gradients,
    run_steps,
)
from trainers import dreambooth
from trainers.errors import UserError
from trainers.families.losses import sample_means
from trainers.run import run


@pytest.fixture
def masks(photos, tmp_path):
    """A function that writes a mask for each photo and returns their folder; the left half of
    the masks counts, or what `paint` makes of an array of zeros."""

    def write(name="masks", paint=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for path in photos.iterdir():
            with Image.open(path) as photo:
                values = np.zeros(photo.size[::-1], np.uint8)
            if paint:
                paint(values)
            else:
                values[:, : values.shape[1] // 2] = 255
            Image.fromarray(values).save(folder / path.name)
        return folder

    return write


# The law of the mean


def test_ones_are_no_mask_to_the_bit():
    error = torch.randn(3, 4, 7, 5, requires_grad=True)
    results = []
    for weight in (None, torch.ones(3, 1, 7, 5)):
        error.grad = None
        means = sample_means(error.square(), weight)
        means.sum().backward()
        results.append((means.detach(), error.grad))
    assert all(torch.equal(plain, masked) for plain, masked in zip(*results, strict=True))


def test_the_scale_depends_on_no_masks_size():
    constant, random = torch.full((4, 2, 8, 8), 3.0), torch.rand(4, 2, 8, 8)
    weight = torch.rand(4, 1, 8, 8) * torch.tensor([1, 0.5, 0.1, 1e-3]).view(4, 1, 1, 1)
    torch.testing.assert_close(sample_means(constant.square(), weight), torch.full((4,), 9.0))
    scaled = sample_means(random.square(), weight / 7)
    torch.testing.assert_close(sample_means(random.square(), weight), scaled)


def test_a_sample_of_which_nothing_counts_gives_zero():
    error = torch.randn(2, 3, 4, 4, requires_grad=True)
    means = sample_means(error.square(), torch.zeros(2, 1, 4, 4))
    means.sum().backward()
    assert means.tolist() == [0, 0]
    assert not error.grad.any()


# The task


def gradient_of_predictions(settings, *overrides, family="sd15"):
    """The first batch, and the gradient of its loss by what the denoiser gives."""
    task, batches, _ = dreambooth.build(settings(*overrides, family=family), Accelerator(cpu=True))
    batch, rng = next(iter(batches(0)))
    predicted = []

    def record(module, inputs, output):
        output.retain_grad()
        predicted.append(output)

    task.players["denoiser"].module.register_forward_hook(record)
    ((_, loss),) = task.losses(batch, rng)
    loss.backward()
    return batch, loss, predicted[0].grad


@pytest.mark.parametrize("family", ["sd15", *FLOWS])
def test_what_is_masked_out_has_no_gradient_at_floor_0(settings, masks, family):
    keys = (f"data.mask_dir={masks()}", "data.mask_floor=0", *PRIOR)
    batch, loss, gradient = gradient_of_predictions(settings, *keys, family=family)
    out = (batch["mask"] == 0).expand_as(gradient)
    assert out[:2].any()
    assert not out[:2].all()
    assert not out[2:].any()  # class pictures count everywhere
    assert loss > 0
    assert not gradient[out].any()
    assert gradient[~out].ne(0).float().mean() > 0.99


def test_the_floor_is_what_a_masked_place_counts(settings, masks):
    folder = masks()
    for floor in (0.25, 1):
        batch, *_ = gradient_of_predictions(
            settings, f"data.mask_dir={folder}", f"data.mask_floor={floor}"
        )
        assert {batch["mask"].min().item(), batch["mask"].max().item()} == {floor, 1}


def test_empty_masks_give_loss_0_and_no_gradient_at_floor_0(settings, masks):
    keys = (f"data.mask_dir={masks(paint=lambda values: values)}", "data.mask_floor=0")
    _, loss, gradient = gradient_of_predictions(settings, *keys)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("family", ["sd15", *FLOWS])
@pytest.mark.parametrize("cache", ["true", "false"])
def test_white_masks_give_the_gradients_of_no_masks_to_the_bit(settings, masks, family, cache):
    white = masks(paint=lambda values: values.fill(255))
    results = []
    for keys in ((), (f"data.mask_dir={white}",)):
        overrides = (f"data.cache={cache}", "data.random_flip=true", *keys)
        _, batch, _, loss, gradients = first_gradients(settings(*overrides, family=family))
        results.append((loss, gradients))
        assert ("mask" in batch) == bool(keys)
    (plain_loss, plain), (loss, masked) = results
    assert torch.equal(plain_loss, loss)
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


# Runs

VARIED = ("data.random_flip=true", "data.center_crop=false", "optimizer.lr_scheduler=constant")


@pytest.mark.parametrize("family", by_hand_but(["flux"], ["sd15", "flux"]))
def test_three_steps_and_three_more_equal_six(settings, masks, tmp_path, family):
    shared = (*VARIED, f"data.mask_dir={masks()}")
    whole = settings(*shared, f"output_dir={tmp_path}/whole", family=family)
    parts = settings(*shared, f"output_dir={tmp_path}/parts", family=family)
    run(whole)
    run_steps(parts, 3)
    run(parts)
    assert_same(whole, parts)
    unmasked = settings(*VARIED, f"output_dir={tmp_path}/unmasked", family=family)
    run(unmasked)
    with pytest.raises(AssertionError):
        assert_close(whole, unmasked)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_four_micro_batches_equal_one_batch_of_four(settings, masks, tmp_path, family):
    shared = (*VARIED, f"data.mask_dir={masks()}", f"data.cache_dir={tmp_path}/cache")
    runs = []
    for size, parts in ((4, 1), (1, 4)):
        batch = (f"train.train_batch_size={size}", f"train.gradient_accumulation_steps={parts}")
        folder = f"output_dir={tmp_path}/{size}"
        runs.append(settings(*shared, *batch, folder, family=family))
        run(runs[-1])
    assert_close(*runs)


def test_another_mask_refuses_to_go_on_and_is_named(settings, masks):
    keys = (f"data.mask_dir={masks()}", "train.max_train_steps=2")
    run(settings(*keys))
    moved = masks("elsewhere")
    settings(f"data.mask_dir={moved}", "train.max_train_steps=2")
    with Image.open(moved / "3.png") as mask:
        Image.eval(mask, lambda value: 255 - value).save(moved / "3.png")
    with pytest.raises(UserError, match=r"mask pictures: changed 3\.png"):
        run(settings(f"data.mask_dir={moved}", "train.max_train_steps=4"))


def test_a_replaced_mask_is_encoded_anew(settings, masks, tmp_path):
    folder = masks()
    keys = (f"data.mask_dir={folder}", f"data.cache_dir={tmp_path}/cache", "data.mask_floor=0")
    before, *_ = gradient_of_predictions(settings, *keys)
    masks(paint=lambda values: values.fill(255))
    after, *_ = gradient_of_predictions(settings, *keys)
    assert (before["mask"] == 0).any()
    assert (after["mask"] == 1).all()
