"""Tiny pipelines as one file in the layout of each model's first release."""

import pytest
import torch
from safetensors.torch import save_file

from tests.shared.tiny_pipelines import MAKERS
from trainers.config.family_facts import family_facts
from trainers.original.layout import component_tensors

DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def hub_state(part, module):
    """The tensors of a component by the names of files on the Hub, where CLIP has a level more."""
    state = module.state_dict()
    has_level = any(key.startswith("text_model.") for key in state)
    level = "text_model." if type(module).__name__ == "CLIPTextModel" and not has_level else ""
    return {level + key: tensor for key, tensor in state.items()}


def original_state(name, pipe, leave_out=()):
    """The tensors of a pipeline in the layout of its release."""
    state = {}
    for part in (*DENOISERS, "vae", *ENCODERS):
        module = getattr(pipe, part, None)
        if module is None or part in leave_out:
            continue
        own = hub_state(part, module)
        for tensor in component_tensors(part, own, family_facts(name)):
            state[tensor.name] = tensor.join([own[key] for key in tensor.parts]).clone()
    return state


def single_file(name, path, leave_out=(), **more):
    """The tiny pipeline of a family as one file; more: tensors that it has besides."""
    pipe = MAKERS[name]()
    with torch.no_grad():
        if name == "sd3":
            # which such files leave out, and diffusers' reader takes for none
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))
    folder = path.with_suffix("")
    pipe.save_pretrained(folder)
    save_file(original_state(name, pipe, leave_out) | more, path)
    return pipe, folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Family name -> its tiny pipeline as one file, as a folder, and in memory."""
    folder, found = tmp_path_factory.mktemp("single"), {}
    for name in MAKERS:
        if family_facts(name).single_file is None:
            continue
        path = folder / f"{name}.safetensors"
        pipe, settings = single_file(name, path)
        found[name] = path, settings, pipe
    return found


def base_of(path, settings=None):
    """The overrides by which a run takes such a file."""
    own = [f"model.pretrained_model_name_or_path={path}"]
    return [*own, f"model.config={settings}"] if settings else own
