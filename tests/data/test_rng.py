"""A row's random draws depend on (seed, step, row) alone, and are spread as they should be."""

import torch

from trainers.data.rng import SampleRng


def drawn(seed, step, rows):
    rng = SampleRng(seed, step, rows)
    return torch.cat([rng.normal((len(rows), 2, 2)).flatten(1), rng.uniform()[:, None]], dim=1)


def test_a_row_draws_the_same_in_any_company():
    together = drawn(0, 3, [5, 2, 9])
    assert torch.equal(together, torch.cat([drawn(0, 3, [row]) for row in (5, 2, 9)]))


def test_rows_steps_and_seeds_draw_differently():
    values = [
        drawn(seed, step, [row])[0, 0].item()
        for seed in range(5)
        for step in range(5)
        for row in range(5)
    ]
    assert len(set(values)) == 125


def test_normals_are_unit_and_uncorrelated_between_rows_and_steps():
    count, width = 500, 64
    now, then = (SampleRng(0, step, range(count)).normal((count, width)) for step in (0, 1))
    bound = 4 / (count * width) ** 0.5  # four standard errors
    assert abs(now.mean()) < bound
    assert abs(now.std() - 1) < bound
    assert abs((now[1:] * now[:-1]).mean()) < bound
    assert abs((now * then).mean()) < bound


def test_stratified_draws_fill_every_part_of_each_pool_however_they_are_shared():
    whole = SampleRng(0, 3, range(16), global_batch_size=8).uniform(stratified=True)
    for pool in (whole[:8], whole[8:]):
        assert sorted((pool * 8).long().tolist()) == list(range(8))
    shared = [
        SampleRng(0, 3, rows, global_batch_size=8).uniform(stratified=True)
        for rows in ([0, 1], [9, 15, 4])
    ]
    assert torch.equal(torch.cat(shared), whole[[0, 1, 9, 15, 4]])
    assert (whole[:8] * 8).long().tolist() != (whole[8:] * 8).long().tolist()
