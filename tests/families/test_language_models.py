"""Families told by a language model: prompts, predictions, times and latents are the pipelines'."""

import pytest
import torch

from tests.shared.draws import Given
from tests.shared.families import conditioned, whole
from tests.shared.language_models import (
    LENGTH,
    READ_BY_LANGUAGE_MODELS,
    TOKENS,
    pipeline_calls,
)
from tests.shared.runs import config_maker
from trainers.data.rng import SampleRng
from trainers.errors import UserError

LONG = "a prompt that is longer than what the language model reads of it, with a sks dog"


@pytest.fixture(scope="module", params=READ_BY_LANGUAGE_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(bases, photos, tmp_path_factory, name):
    """Loaded once, for it is not changed."""
    return whole(config_maker(bases, photos, tmp_path_factory.mktemp(name))(LENGTH, family=name))


@pytest.mark.parametrize(
    ("prompt", "size"), [("a b c", (16, 24)), ("", (24, 16)), (LONG, (16, 16))], ids=str
)
@torch.no_grad()
def test_predictions_equal_what_the_pipeline_gives_its_scheduler(family, pipes, name, prompt, size):
    """Both steps go in at once, so each row must be read at its own time."""
    x_t, t, v = pipeline_calls(pipes[name], prompt, size)
    ours = family.predict(family.denoiser, x_t, t, conditioned(family, prompt, prompt))
    torch.testing.assert_close(ours, v, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_rows_with_other_prompts_and_times_are_read_each_by_its_own(family, name, pipes):
    prompts = ["a b c", "", LONG]
    x_t, t, _ = pipeline_calls(pipes[name])
    x_t, t = x_t[:1].expand(3, -1, -1, -1), torch.tensor([0.1, 0.5, 0.9])
    together = family.predict(family.denoiser, x_t, t, conditioned(family, *prompts))
    for i, prompt in enumerate(prompts):
        alone = family.predict(family.denoiser, x_t[:1], t[i, None], conditioned(family, prompt))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("shift", ["auto", "none"])
def test_times_are_shifted_as_the_pipeline_does_in_its_usual_steps(
    settings, family, name, pipes, shift
):
    config = settings(f"objective.shift={shift}", "objective.density=uniform", family=name)
    grid = (0.9, 0.5, 0.1)
    times = pipeline_calls(pipes[name], sigmas=grid)[1]
    objective = family.make_objective(config.objective, (8, 12))
    ours = objective.times(Given(torch.tensor(grid)))
    torch.testing.assert_close(ours, times if shift == "auto" else torch.tensor(grid))


def test_prompts_have_the_tokens_of_the_pipeline(family, name, pipes):
    """As the marks of a chat and the words of a user."""
    seen = []
    encoder = pipes[name].text_encoder
    hook = encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    for prompt in ("a b c", "", LONG):
        pipes[name].encode_prompt(prompt, max_sequence_length=TOKENS)
        assert torch.equal(family.tokenize("text_encoder", prompt), seen.pop(0)[0])
        seen.clear()
    hook.remove()


def test_what_is_cut_off_a_prompt_is_told_without_the_marks(family):
    total, read, rest = family.count_tokens("text_encoder", "a b c")
    # <|im_start|>, user and a line break come before
    assert (total, read, rest) == (3 + 5, TOKENS, "")
    total, read, rest = family.count_tokens("text_encoder", LONG)
    assert (total, read) == (3 + len(LONG), TOKENS)
    assert rest == LONG[TOKENS - 3 :]


@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes(family, name, pipes):
    """A sampler's step over no noise hands the latents on to the pipeline's own decoding."""
    pipe = pipes[name]
    pixels = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.latents(family.encode_image(pixels)[None], SampleRng(0, 0, [7]))
    posterior = pipe.vae.encode(pixels[None]).latent_dist
    z = posterior.mean + posterior.std * SampleRng(0, 0, [7]).normal(latents.shape)
    expected = pipe.vae.decode(z).sample
    given = latents
    if pipe.vae.config.get("scaling_factor") is None:
        given = torch.nn.functional.pixel_unshuffle(latents, 2)
    decoded = pipe(
        prompt="a",
        height=16,
        width=24,
        num_inference_steps=1,
        sigmas=[1e-9],
        guidance_scale=0.0,
        latents=given,
        output_type="pt",
    ).images
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_no_language_model_trains(settings, name):
    with pytest.raises(UserError, match=r"train_text_encoder: .* is a language model"):
        settings("train.train_text_encoder=true", family=name)
