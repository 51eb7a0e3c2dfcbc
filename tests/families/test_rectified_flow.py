"""Rectified flow against diffusers' schedulers and the papers' formulas: times, shifts, weights."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tests.shared.draws import Given, tensors
from trainers.data.rng import SampleRng
from trainers.families.objectives import RectifiedFlow, resolution_shift


def mode(u):
    """Esser et al. 2024, section 3.1, with s = 1.29."""
    return 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def mode_cdf(t):
    """P(mode(u) <= t) is 1 - u at the u where the falling mode(u) is t, found by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            torch.where(mode(middle) > t, middle, low),
            torch.where(mode(middle) > t, high, middle),
        )
    return 1 - low


CDFS = {  # of t, 1 is noise
    "uniform": ({"density": "uniform"}, lambda t: t),
    "logit-normal": ({"density": "logit_normal"}, lambda t: torch.special.ndtr(t.logit())),
    "logit-normal, more noise": (
        {"density": "logit_normal", "logit_mean": 0.7, "logit_std": 0.5},
        lambda t: torch.special.ndtr((t.logit() - 0.7) / 0.5),
    ),
    "mode": ({"density": "mode"}, mode_cdf),
    "cosmap": ({"density": "cosmap"}, lambda t: 0.5 + 2 / math.pi * torch.atan(2 * t - 1)),
}


def farthest(samples, cdf, shift):
    """Kolmogorov and Smirnov's distance of samples of t from `cdf` shifted, whose t came from t /
    (a - (a - 1) t)."""
    shifted, n = samples.double().sort().values, len(samples)
    probability = cdf(shifted / (shift - (shift - 1) * shifted))
    return torch.maximum(
        torch.arange(1, n + 1) / n - probability, probability - torch.arange(n) / n
    ).max()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("options", "cdf"), CDFS.values(), ids=CDFS)
def test_times_have_the_papers_density(options, cdf, shift):
    n = 4000
    plain, even = (
        RectifiedFlow(**options, shift=shift, stratified=stratified).times(
            SampleRng(0, 0, range(n), global_batch_size=n)
        )
        for stratified in (False, True)
    )
    assert farthest(plain, cdf, shift) < 1.95 / n**0.5  # 99.9 %
    assert farthest(even, cdf, shift) < 1.01 / n  # one time in each of n equally likely parts


def test_the_cosmap_density_is_its_cdfs_slope():
    """Ties the distribution above to the density of the paper, 2 / (pi (1 - 2 t + 2 t^2))."""
    grid = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(CDFS["cosmap"][1](grid).sum(), grid)
    torch.testing.assert_close(slope, 2 / (math.pi * (1 - 2 * grid + 2 * grid**2)))


@pytest.mark.parametrize("options", [options for options, _ in CDFS.values()], ids=CDFS)
@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 20.0])
def test_times_stay_between_signal_and_noise_at_the_ends_of_the_draw(options, shift):
    times = RectifiedFlow(**options, shift=shift).times(
        Given(torch.tensor([2**-24, 1e-4, 0.5, 1 - 1e-4, 1 - 2**-24]))
    )
    assert (times > 0).all()
    assert (times < 1).all()


@pytest.mark.parametrize("options", [options for options, _ in CDFS.values()], ids=CDFS)
@pytest.mark.parametrize("stratified", [False, True])
def test_a_rows_time_does_not_depend_on_its_company(options, stratified):
    flow = RectifiedFlow(**options, shift=3.0, stratified=stratified)
    whole = flow.times(SampleRng(0, 3, range(8), global_batch_size=8))
    shared = [
        flow.times(SampleRng(0, 3, rows, global_batch_size=8))
        for rows in ([5], [0, 7], [2, 6, 1, 4, 3])
    ]
    assert torch.equal(torch.cat(shared), whole[[5, 0, 7, 2, 6, 1, 4, 3]])


def flow_tensors():
    """x0, eps and times on the grid of SD3's scheduler, whose shift is 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([1, 250, 500, 750, 998, 999])
    x0, eps, _ = tensors()
    return scheduler, index, x0, eps, scheduler.sigmas[index]


def test_flow_corrupts_as_the_scheduler():
    scheduler, index, x0, eps, times = flow_tensors()
    expected = scheduler.scale_noise(x0, scheduler.timesteps[index], eps)
    torch.testing.assert_close(RectifiedFlow().corrupt(x0, eps, times), expected)


def test_the_target_leads_from_any_time_to_the_clean_latents_and_to_the_noise():
    _, _, x0, eps, times = flow_tensors()
    x_t, v, time = (
        RectifiedFlow().corrupt(x0, eps, times),
        RectifiedFlow().target(x0, eps, times),
        times.view(-1, 1, 1, 1),
    )
    torch.testing.assert_close(x_t - time * v, x0)
    torch.testing.assert_close(x_t + (1 - time) * v, eps)


def test_one_euler_step_of_the_scheduler_along_the_target_ends_at_the_clean_latents():
    x0, eps, _ = tensors()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.6])
    x_t = RectifiedFlow().corrupt(x0, eps, scheduler.sigmas[:1].expand(len(x0)))
    v = RectifiedFlow().target(x0, eps, scheduler.sigmas[:1])
    torch.testing.assert_close(scheduler.step(v, scheduler.timesteps[0], x_t).prev_sample, x0)


def test_flow_noise_is_the_plain_draw():
    assert torch.equal(
        RectifiedFlow().noise(torch.ones(3, 4, 2, 2), SampleRng(0, 1, range(3))),
        SampleRng(0, 1, range(3)).normal((3, 4, 2, 2)),
    )


def shifted(factor, grid):
    return RectifiedFlow(density="uniform", shift=factor).times(Given(grid))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_static_shift_is_the_schedulers(factor):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    grid = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(shifted(factor, grid), scheduler.sigmas)
    assert resolution_shift(scheduler.config, 1024) == factor


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize(
    "slope", [{}, {"base_image_seq_len": 64, "max_image_seq_len": 1000, "max_shift": 2.0}]
)
def test_a_dynamic_shift_is_the_pipelines(tokens, slope):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **slope)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    grid = torch.linspace(0.01, 0.99, 99)
    factor = resolution_shift(scheduler.config, tokens)
    torch.testing.assert_close(shifted(factor, grid), scheduler.time_shift(mu, 1.0, grid))


def flow_loss(objective, v, seed=0):
    """As the trainer weighs it, for predictions v."""
    x0, eps, _ = tensors(seed)
    times = torch.tensor([0.01, 0.2, 0.4, 0.6, 0.8, 0.99])
    error = (v - objective.target(x0, eps, times)).square().mean(dim=(1, 2, 3))
    return (
        (objective.weight(times) * error).mean(),
        objective.corrupt(x0, eps, times),
        times.view(-1, 1, 1, 1),
        x0,
    )


def test_preconditioned_is_the_loss_of_the_clean_latents():
    """The diffusers script for SD3 reads the output v as the estimate x_t - t v of x0."""
    _, _, v = tensors(seed=1)
    ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
    loss, x_t, times, x0 = flow_loss(RectifiedFlow(precondition=True), ours)
    expected = (x_t - times * theirs - x0).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(*pair)[0] for pair in ((loss, ours), (expected, theirs)))
    )


def test_sigma_sqrt_undoes_preconditioning():
    _, _, v = tensors(seed=1)
    plain, both = (
        flow_loss(flow, v)[0]
        for flow in (RectifiedFlow(), RectifiedFlow(weighting="sigma_sqrt", precondition=True))
    )
    torch.testing.assert_close(both, plain)


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize(
    ("weighting", "closed_form"),
    [
        ("none", lambda t: torch.ones_like(t)),
        ("sigma_sqrt", lambda t: 1 / t**2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
    ],
    ids=["none", "sigma_sqrt", "cosmap"],
)
def test_flow_weights_equal_the_papers(weighting, closed_form, precondition):
    times = torch.linspace(0.01, 0.99, 99)
    weight = RectifiedFlow(weighting=weighting, precondition=precondition).weight(times)
    double = times.double()
    torch.testing.assert_close(
        weight.double(), closed_form(double) * (double**2 if precondition else 1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_flow_weights_are_finite_and_positive_at_the_first_and_last_time(weighting, precondition):
    ends = shifted(1.0, torch.tensor([0.0, 1.0]))
    weight = RectifiedFlow(weighting=weighting, precondition=precondition).weight(ends)
    assert weight.isfinite().all()
    assert (weight > 0).all()
