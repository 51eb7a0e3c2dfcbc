"""A LoRA of any format that is put on a pipeline computes the same updates."""

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.shared.saved_loras import ALL, check, family_of
from trainers.lora import peft_format
from trainers.lora.files import load_lora, read_lora
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


@pytest.mark.parametrize("name", ALL)
def test_a_kohya_file_on_a_pipeline_is_the_diffusers_file(made, bases, name):
    folder, _ = made[name]
    states = []
    for file in (WEIGHT_NAME, KOHYA_NAME):
        family = family_of(bases[name], name)
        family.load(family.denoiser_name, *family.clip_encoders)
        load_lora(family, folder / file)
        states.append(to_products(family))
    check(states[1], states[0])


def test_a_peft_folder_on_a_pipeline_is_the_diffusers_file(made, bases, tmp_path):
    folder, _ = made["sd15"]
    family = family_of(bases["sd15"], "sd15")
    peft_format.write(read_lora(folder / WEIGHT_NAME, family), family, tmp_path, {})
    states = []
    for place in (folder / WEIGHT_NAME, tmp_path):
        family = family_of(bases["sd15"], "sd15")
        family.load(family.denoiser_name, *family.clip_encoders)
        load_lora(family, place)
        states.append(to_products(family))
    check(states[1], states[0])


def to_products(family):
    found = {}
    for part in (family.denoiser_name, *family.clip_encoders):
        for name, layer in getattr(family.pipe, part).named_modules():
            if isinstance(layer, BaseTunerLayer):
                (adapter,) = layer.active_adapters
                found[f"{part}.{name}"] = layer.get_delta_weight(adapter).detach().flatten(1)
    return found
