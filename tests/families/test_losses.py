"""Losses, ranges of times and kinds of noise keep to their closed forms, for both objectives."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from tests.shared.runs import losses, run_steps
from trainers import dreambooth
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.families.objectives import DDPM, RectifiedFlow
from trainers.run import run

ABAR = torch.linspace(0.999, 0.01, 1000)
ROWS = list(range(4096))
FLOWS = {
    "uniform": {"density": "uniform"},
    "logit_normal": {"logit_mean": 0.4, "shift": 3.0},
    "mode": {"density": "mode", "shift": 0.5},
    "cosmap": {"density": "cosmap"},
}


def objectives(**options):
    return DDPM(ABAR, **options), RectifiedFlow(**options)


def times_of(objective, count=4):
    """Times over the whole schedule."""
    shares = torch.linspace(0.05, 0.95, count)
    return (shares * 1000).long() if isinstance(objective, DDPM) else shares


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_is_square_far_below_its_width_and_straight_far_above(schedule):
    for objective in objectives(loss="huber", huber_c=0.2, huber_schedule=schedule):
        t = times_of(objective)
        c = objective.huber_width(t)
        small, large = (torch.full((4, 1, 2, 2), size) for size in (1e-4, 1e4))
        torch.testing.assert_close(objective.distance(small, t), small.square())
        straight = 2 * c.view(-1, 1, 1, 1) * large
        torch.testing.assert_close(objective.distance(large, t), straight, rtol=1e-3, atol=0)


def test_smooth_l1_is_huber_over_its_width_and_half_of_it_torchs_pseudo_huber():
    difference = torch.linspace(-3, 3, 16).view(4, 1, 2, 2)
    for huber, smooth in zip(objectives(loss="huber"), objectives(loss="smooth_l1"), strict=True):
        t = times_of(huber)
        width = huber.huber_width(t).view(-1, 1, 1, 1)
        expected = 2 * ((difference.square() + width.square()).sqrt() - width)
        torch.testing.assert_close(smooth.distance(difference, t), expected)
        torch.testing.assert_close(huber.distance(difference, t), width * expected)


def test_the_width_falls_from_one_to_its_end_as_the_paper_has_it():
    """Khrapov et al. 2024, section 4: exp(t log c / T), and (1 - c) / (1 + sigma)^2 + c."""
    c = 0.05
    t = torch.tensor([0, 300, 999])
    exponential = DDPM(ABAR, loss="huber", huber_c=c, huber_schedule="exponential")
    expected = [math.exp(int(step) / 1000 * math.log(c)) for step in t]
    torch.testing.assert_close(exponential.huber_width(t), torch.tensor(expected))
    sigma = ((1 - ABAR[t]) / ABAR[t]).sqrt()
    by_snr = DDPM(ABAR, loss="huber", huber_c=c).huber_width(t)
    torch.testing.assert_close(by_snr, (1 - c) / (1 + sigma) ** 2 + c)
    flow = RectifiedFlow(loss="huber", huber_c=c).huber_width(torch.tensor([1e-4, 0.5, 1 - 1e-6]))
    torch.testing.assert_close(flow, torch.tensor([1, c + (1 - c) / 4, c]), rtol=1e-3, atol=0)
    # zero terminal SNR
    assert DDPM(torch.zeros(1), loss="huber", huber_c=c).huber_width(t[:1]) == c


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_times_of_a_range_are_those_of_all_times_that_lie_in_it(flow):
    low, high = 0.3, 0.8
    whole, part = (RectifiedFlow(**flow, t_range=r) for r in ((0.0, 1.0), (low, high)))
    rng = SampleRng(0, 0, ROWS, global_batch_size=len(ROWS))
    every, some = whole.times(rng), part.times(SampleRng(1, 0, ROWS, global_batch_size=len(ROWS)))
    assert low - 1e-5 <= some.min() <= some.max() <= high + 1e-5
    inside = every[(every > low) & (every < high)]
    shares = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(some.quantile(shares), inside.quantile(shares), rtol=0, atol=0.01)


def test_times_of_ddpm_lie_evenly_in_their_range_and_without_one_as_before():
    rng = SampleRng(0, 0, ROWS, global_batch_size=len(ROWS))
    times = DDPM(ABAR, t_range=(0.2, 0.5)).times(rng)
    assert (times.min(), times.max()) == (200, 499)
    assert times.float().mean() == pytest.approx(349.5, abs=1)
    plain = (SampleRng(0, 0, ROWS, global_batch_size=len(ROWS)).uniform(True) * 1000).long()
    assert torch.equal(DDPM(ABAR).times(SampleRng(0, 0, ROWS, global_batch_size=4096)), plain)


def test_coarse_noise_has_unit_variance_and_is_alike_over_areas():
    rows = list(range(256))
    x0 = torch.zeros(256, 4, 32, 32)
    plain, coarse = (
        DDPM(ABAR, multires_noise_levels=levels, multires_noise_discount=0.8).noise(
            x0, SampleRng(0, 0, rows)
        )
        for levels in (0, 6)
    )
    torch.testing.assert_close(coarse.square().mean((1, 2, 3)), torch.ones(256), rtol=0, atol=0.5)
    torch.testing.assert_close(coarse.std((1, 2, 3), correction=0), torch.ones(256))
    areas = [F.avg_pool2d(eps, 8).var().item() for eps in (plain, coarse)]
    assert areas[0] == pytest.approx(1 / 64, rel=0.1)
    assert areas[1] > 10 * areas[0]
    # of a row alone, whatever the batch
    alone = DDPM(ABAR, multires_noise_levels=6, multires_noise_discount=0.8)
    torch.testing.assert_close(alone.noise(x0[:1], SampleRng(0, 0, [7]))[0], coarse[7])


def test_perturbed_noise_has_the_added_variance_and_the_target_is_the_plain_one(settings):
    for objective in objectives(input_perturbation=0.5):
        rng = SampleRng(0, 0, ROWS[:64])
        eps = objective.noise(torch.zeros(64, 4, 16, 16), rng)
        perturbed = objective.perturbed(eps, rng)
        assert (perturbed - eps).var() == pytest.approx(0.25, rel=0.05)
        correlation = torch.corrcoef(torch.stack([eps.flatten(), (perturbed - eps).flatten()]))
        assert abs(correlation[0, 1]) < 0.02
    task, batches, _ = dreambooth.build(
        settings("objective.input_perturbation=0.5"), Accelerator(cpu=True)
    )
    batch, rng = next(iter(batches(0)))
    x0, eps, t = task.draw_inputs(batch, SampleRng(rng.seed, 0, rng.rows, "cpu"))
    seen = []
    task.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    ((_, loss),) = task.losses(batch, SampleRng(rng.seed, 0, rng.rows, "cpu"))
    objective = task.objective(x0.shape[-2:])
    x_t, _, condition = seen[0][:3]
    assert not torch.allclose(x_t, objective.corrupt(x0, eps, t))
    with torch.no_grad():
        prediction = task.module(x_t, t, condition)
    expected = (batch["weight"] * (prediction.float() - eps).square().mean((1, 2, 3))).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_three_steps_and_three_more_equal_six(settings, tmp_path, family):
    options = ["objective.loss=huber", "objective.input_perturbation=0.1"]
    options += ["objective.t_range=[0.2,0.9]"]
    if family == "sd15":
        options += ["objective.multires_noise_levels=2"]
    straight, parts = (
        settings(*options, f"output_dir={tmp_path}/{name}", family=family)
        for name in ("straight", "parts")
    )
    run(straight)
    run_steps(parts, 3)
    run(parts)
    assert losses(straight) == losses(parts)


REFUSED = {
    "objective.t_range=[0.5,0.5]": "objective.t_range: from 0.5 to 0.5 there is no time",
    "objective.t_range=[0.9,0.1]": "objective.t_range: from 0.9 to 0.1",
    "objective.t_range=[0,2]": r"objective.t_range",
    "objective.t_range=0.5": r"objective.t_range",
    "objective.huber_c=0.5": "objective.huber_c: has no effect with l2",
    "objective.multires_noise_discount=0.5": "discount: has no effect without",
    "objective.loss=l1": "objective.loss",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_makes_no_sense_is_refused(settings, override):
    with pytest.raises(UserError, match=REFUSED[override]):
        settings(override)
