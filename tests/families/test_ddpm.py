"""DDPM against diffusers' schedulers and the papers' formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from tests.shared.draws import t, tensors
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.families.objectives import DDPM

STANDARD = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_SNR = DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
)
TYPES = ("epsilon", "v_prediction")


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
