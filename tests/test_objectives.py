"""DDPM and Flow against diffusers' schedulers and the papers' formulas, and the laws of the random
draws."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.families.objectives import DDPM, RectifiedFlow, resolution_shift

STANDARD = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_SNR = DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
)
TYPES = ("epsilon", "v_prediction")
t = torch.tensor([0, 1, 250, 500, 998, 999])


def tensors(seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return (torch.randn(len(t), 4, 3, 2, generator=r, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("scheduler", [STANDARD, ZERO_SNR], ids=["standard", "zero terminal SNR"])
def test_corrupt_and_target_equal_diffusers(scheduler):
    x0, eps, _ = tensors()
    objective = DDPM(scheduler.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(objective.corrupt(x0, eps, t), scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(objective.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))
    assert torch.equal(DDPM(scheduler.alphas_cumprod, "epsilon").target(x0, eps, t), eps)


def test_weights_equal_the_papers():
    abar = STANDARD.alphas_cumprod.double()
    s = abar / (1 - abar)
    capped = s.clamp(max=5)
    expected = {
        ("epsilon", 5.0, False): capped / s,
        ("v_prediction", 5.0, False): capped / (s + 1),
        ("epsilon", None, True): 1 / s.sqrt(),
        ("v_prediction", None, True): s.sqrt() / (s + 1),
        ("epsilon", None, False): torch.ones(1000),
        ("v_prediction", None, False): torch.ones(1000),
    }
    for (kind, gamma, debiased), weight in expected.items():
        ours = DDPM(STANDARD.alphas_cumprod, kind, gamma, debiased).weight(torch.arange(1000))
        torch.testing.assert_close(
            ours.double(), weight.double(), rtol=1e-3, atol=0
        )  # 1 - abar cancels in float32


@pytest.mark.parametrize(
    "weighting", [{"snr_gamma": 5.0}, {"debiased": True}], ids=["min-SNR", "debiased"]
)
def test_weighted_eps_and_v_losses_weigh_the_same_x0_error_equally(weighting):
    x0, eps, wrong_x0 = tensors(dtype=torch.float64)
    abar = STANDARD.alphas_cumprod.double()
    a, b = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
    wrong_eps = (a * x0 + b * eps - a * wrong_x0) / b  # both explain the same x_t
    predictions = {"epsilon": wrong_eps, "v_prediction": a * wrong_eps - b * wrong_x0}
    losses = []
    for kind, prediction in predictions.items():
        objective = DDPM(abar, kind, **weighting)
        error = (prediction - objective.target(x0, eps, t)).square().mean(dim=(1, 2, 3))
        losses.append(objective.weight(t) * error)
    torch.testing.assert_close(*losses)


def test_a_base_that_predicts_something_else_is_refused():
    with pytest.raises(UserError, match="sample"):
        DDPM(STANDARD.alphas_cumprod, "sample")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("weighting", [{}, {"snr_gamma": 5.0}, {"debiased": True}])
def test_weights_are_finite_where_no_signal_is_left(kind, weighting):
    assert ZERO_SNR.alphas_cumprod[-1] == 0
    weight = DDPM(ZERO_SNR.alphas_cumprod, kind, **weighting).weight(torch.arange(1000))
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def test_noise_offset_adds_a_constant_to_each_channel():
    x0, rows = torch.zeros(200, 4, 3, 3), range(200)
    plain, offset = (
        DDPM(STANDARD.alphas_cumprod, noise_offset=o).noise(x0, SampleRng(0, 0, rows))
        for o in (0, 0.1)
    )
    shift = offset - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    levels = shift[..., 0, 0]
    assert levels.std().item() == pytest.approx(0.1, rel=0.1)
    assert len(levels.unique()) == levels.numel()


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


@pytest.mark.parametrize("count", [1, 8])
def test_times_are_uniform_over_all_steps(count):
    n, bins = 5000, 10
    draws = [
        SampleRng(0, step, range(count), global_batch_size=count) for step in range(n // count)
    ]
    times = torch.cat([DDPM(STANDARD.alphas_cumprod).times(rng) for rng in draws])
    assert times.min() >= 0
    assert times.max() < 1000
    counts = torch.bincount(times * bins // 1000, minlength=bins)
    assert (counts - n / bins).square().sum() / (
        n / bins
    ) < 27.9  # chi-square, 9 degrees of freedom, 99.9 %


# Flow


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


class Given:
    """Draws whose uniform numbers are given."""

    def __init__(self, u):
        self.u = u

    def uniform(self, stratified):
        return self.u


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
