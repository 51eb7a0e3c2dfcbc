"""Ignored pixels neither cost nor teach anything, however many a picture has."""

import pytest
import torch
import torch.nn.functional as F

from trainers.config import UNetConfig
from trainers.from_scratch.uses.segment import Segment


@pytest.fixture
def segment():
    return Segment(UNetConfig(objective={"classes": 3, "dice_weight": 0.0}))


def masks(*ignored_rows):
    """A mask of 16 x 16 pixels for each number: so many of its rows are to be ignored."""
    y = torch.randint(3, (len(ignored_rows), 16, 16), generator=torch.Generator().manual_seed(0))
    for mask, count in zip(y, ignored_rows, strict=True):
        mask[:count] = 255
    return y


@pytest.mark.parametrize("ignored", [0, 5, 14])
def test_cross_entropy_is_the_mean_over_known_pixels(segment, ignored):
    """As PyTorch's own, wherever the pictures have as many of them."""
    y = masks(ignored, ignored)
    prediction = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(prediction, y, ignore_index=255)
    torch.testing.assert_close(segment.loss(prediction, y), expected)


def test_micro_batches_with_other_numbers_of_known_pixels_equal_one_batch(segment):
    y = masks(0, 15, 8, 16)
    prediction = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = [segment.loss(prediction[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(sum(parts) / 4, segment.loss(prediction, y))


def test_a_batch_that_is_ignored_altogether_costs_nothing_and_teaches_nothing():
    use = Segment(UNetConfig(objective={"classes": 3}))
    prediction = torch.randn(2, 3, 16, 16, requires_grad=True)
    loss = use.loss(prediction, masks(16, 16))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert (prediction.grad == 0).all()
