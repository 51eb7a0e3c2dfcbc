"""The layout of each release is the one that diffusers' own readers take."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from trainers.config.family_facts import family_facts
from trainers.original.layout import Change, OriginalTensor, component_tensors


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_diffusers_reads_the_same_pipeline_of_the_file(files, name):
    path, settings, pipe = files[name]
    theirs = type(pipe).from_single_file(str(path), config=str(settings))
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        state, wanted = getattr(theirs, part).state_dict(), module.state_dict()
        assert state.keys() == wanted.keys()
        # of a T5 it leaves the second name of the same weights without content
        found = {key: value for key, value in state.items() if not value.is_meta}
        assert state.keys() - found.keys() <= {"encoder.embed_tokens.weight"}
        assert all(torch.equal(value, wanted[key]) for key, value in found.items()), part


def test_diffusers_converter_reads_the_same_flux():
    """It knows one width alone: here with all rows, and one column of each matrix."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True, in_channels=64
        )
    rng, state = torch.Generator().manual_seed(0), {}
    for key, tensor in model.state_dict().items():
        size = (len(tensor), 1) if tensor.ndim == 2 else tensor.shape
        state[key] = torch.randn(size, generator=rng)
    released = {}
    for tensor in component_tensors("transformer", state, family_facts("flux")):
        released[tensor.name] = tensor.join([state[key] for key in tensor.parts])
    theirs = convert_flux_transformer_checkpoint_to_diffusers(released)
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], state[key]) for key in state)


@pytest.mark.parametrize("change", Change)
def test_a_tensor_is_split_into_what_it_was_joined_of(change):
    parts = [torch.randn(4, 3), torch.randn(2, 3)]
    if change in (Change.TURNED, Change.KERNEL):
        parts = parts[:1]
    tensor = OriginalTensor("x", tuple("ab"[: len(parts)]), change)
    whole = tensor.join(parts)
    back = tensor.split(whole, [part.shape for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))
    assert tensor.split(whole, [torch.Size((9, 3))]) is None
