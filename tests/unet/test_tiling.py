"""Tiles give what the whole picture would give."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tests.shared.unets import pixels, random
from trainers.data.imaging import mirror_pad
from trainers.from_scratch.tiling import predict_tiled, tile_offsets


@pytest.mark.parametrize("size", [(5, 9), (16, 16), (1, 3), (30, 4)])
def test_mirroring_equals_numpys(size):
    x = pixels(1, 2, *size)
    down, right = (max(0, 16 - side) for side in size)
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, down), (0, right)], mode="symmetric")
    assert np.array_equal(mirror_pad(x, 16, 16), expected)


SIZES = [(16, 16), (16, 40), (5, 9), (33, 47), (50, 17), (8, 60)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_what_looks_at_one_pixel_give_the_whole(size):
    x = random(2, 3, *size)
    torch.testing.assert_close(predict_tiled(nn.Identity(), x, 16), x)
    mixing = nn.Conv2d(3, 5, 1)
    torch.testing.assert_close(predict_tiled(mixing, x, 16), mixing(x))


@pytest.mark.parametrize("size", [(16, 40), (33, 47), (50, 17)])
def test_tiles_of_what_looks_at_neighbours_give_the_whole_but_at_their_edges(size):
    x, blur = random(1, 2, *size), nn.Conv2d(2, 3, 3, padding=1)
    inner = [torch.ones(side, dtype=torch.bool) for side in size]
    for kept, side in zip(inner, size, strict=True):
        for top in tile_offsets(side, 16):
            for edge in {top, top + 15} - {0, side - 1}:
                kept[edge] = False
    at = inner[0][:, None] & inner[1]
    assert at.float().mean() > 0.5
    torch.testing.assert_close(predict_tiled(blur, x, 16)[..., at], blur(x)[..., at])


def test_a_tile_counts_the_more_the_nearer_its_middle():
    answers = iter([1.0, 0.0])
    row = predict_tiled(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 16, 24), 16)[
        0, 0
    ]
    assert (row == row[:1]).all()
    assert (row[0, :8] == 1).all()
    assert (row[0, 16:] == 0).all()
    assert (row[0, 7:17].diff() < 0).all()
    torch.testing.assert_close(row[0] + row[0].flip(0), torch.ones(24))


def test_tiles_cover_everything_half_a_tile_apart():
    for length in range(16, 80):
        starts = tile_offsets(length, 16)
        assert starts[0] == 0
        assert starts[-1] == length - 16
        assert all(0 < b - a <= 8 for a, b in pairwise(starts))
