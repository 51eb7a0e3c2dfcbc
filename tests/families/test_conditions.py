"""Prompts are encoded as the family's own diffusers pipeline encodes them."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.shared.families import ALL, FLOWS, LENGTH, PROMPTS, UNETS, conditioned, encoded, whole


@pytest.mark.parametrize("name", ALL)
def test_conditions_equal_the_pipelines(settings, pipes, name):
    length = {} if name in UNETS else {"max_sequence_length": LENGTH}
    theirs = encoded(pipes[name], PROMPTS, **length)
    torch.testing.assert_close(conditioned(whole(settings(family=name)), *PROMPTS), theirs)


@pytest.mark.parametrize("name", FLOWS)
def test_the_t5_reads_as_many_tokens_as_the_pipeline_lets_it(settings, pipes, name):
    family = whole(settings("model.max_sequence_length=null", family=name))
    ours, theirs = conditioned(family, *PROMPTS), encoded(pipes[name], PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # one by one, and all at once


def test_without_its_t5_sd3_is_conditioned_as_the_pipeline_without_it(settings, bases):
    pipe = StableDiffusion3Pipeline.from_pretrained(bases["sd3"], text_encoder_3=None)
    family = whole(settings("model.text_encoder_3=null", family="sd3"))
    assert family.pipe.text_encoder_3 is None
    theirs = encoded(pipe, PROMPTS, max_sequence_length=LENGTH)
    torch.testing.assert_close(conditioned(family, *PROMPTS), theirs)
