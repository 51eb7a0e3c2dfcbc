"""Singular values, energy and the suggested rank of an update, against numpy."""

import numpy as np
import pytest
import torch

from trainers.lora.low_rank import energy_by_rank, smallest_rank, svd
from trainers.lora.update import LoraUpdate


@pytest.fixture(scope="module")
def pairs():
    rng = torch.Generator().manual_seed(0)

    def pair(a, b):
        return LoraUpdate(torch.randn(a, generator=rng), torch.randn(b, generator=rng))

    return {
        "wide": pair((4, 9), (7, 4)),
        "thin": pair((4, 3), (2, 4)),
        "conv": pair((3, 5, 3, 3), (6, 3, 1, 1)),
    }


def full(pair):
    a, b = (m.flatten(1).double().numpy() for m in (pair.a, pair.b))
    return b @ a


def test_singular_values_are_those_of_the_whole_update(pairs):
    for name, update in pairs.items():
        _, values, _ = svd(update)
        whole = np.linalg.svd(full(pairs[name]), compute_uv=False)
        assert np.allclose(values.numpy(), whole[: len(values)], rtol=1e-10)
        assert np.allclose(whole[len(values) :], 0, atol=1e-10)


def test_the_energy_of_a_rank_is_what_cutting_every_layer_keeps(pairs):
    kept = energy_by_rank(pairs)
    total = sum(np.square(full(pair)).sum() for pair in pairs.values())
    for rank, share in enumerate(kept, 1):
        lost = 0.0
        for pair in pairs.values():
            u, s, v = np.linalg.svd(full(pair), full_matrices=False)
            lost += np.square(full(pair) - (u[:, :rank] * s[:rank]) @ v[:rank]).sum()
        assert share == pytest.approx(1 - lost / total)
    assert len(kept) == 4


def test_the_suggested_rank_is_the_smallest_that_keeps_enough():
    assert smallest_rank([0.5, 0.9, 0.99, 1.0]) == 3
    assert smallest_rank([0.5, 0.9, 0.99, 1.0], share_kept=0.9) == 2
    assert smallest_rank([0.5, 1 - 1e-12], share_kept=1.0) == 2
    untrained = {"layer": LoraUpdate(torch.randn(4, 8), torch.zeros(8, 4))}
    assert smallest_rank(energy_by_rank(untrained)) == 1
