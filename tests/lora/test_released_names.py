"""Files for the released models get the updates that diffusers' own converters would give."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from tests.shared.lora_files import denoiser_names
from tests.shared.saved_loras import check, products, random_lora
from trainers.lora.kohya import to_kohya

SIDE = 8  # width of the released SD3 in these tests


def released_sd3(blocks):
    """Names and shapes of the model as released, with dual attention in all blocks but the last."""
    shapes = {
        "x_embedder.proj": (SIDE, 4, 2, 2),
        "context_embedder": (SIDE, 6),
        "final_layer.linear": (16, SIDE),
    }
    shapes |= {
        "t_embedder.mlp.0": (SIDE, 4),
        "t_embedder.mlp.2": (SIDE, SIDE),
        "y_embedder.mlp.0": (SIDE, 5),
    }
    shapes |= {"y_embedder.mlp.2": (SIDE, SIDE), "final_layer.adaLN_modulation.1": (2 * SIDE, SIDE)}
    for i in range(blocks):
        last = i == blocks - 1
        for side in ("x", "context"):
            block = f"joint_blocks.{i}.{side}_block"
            shapes[f"{block}.attn.qkv"] = (3 * SIDE, SIDE)
            chunks = (9 if not last else 6) if side == "x" else (2 if last else 6)
            shapes[f"{block}.adaLN_modulation.1"] = (chunks * SIDE, SIDE)
            if side == "x" or not last:
                shapes |= {f"{block}.attn.proj": (SIDE, SIDE), f"{block}.mlp.fc1": (4 * SIDE, SIDE)}
                shapes[f"{block}.mlp.fc2"] = (SIDE, 4 * SIDE)
            if side == "x" and not last:
                shapes |= {
                    f"{block}.attn2.qkv": (3 * SIDE, SIDE),
                    f"{block}.attn2.proj": (SIDE, SIDE),
                }
    return shapes


def released_flux(columns=2):
    """At full width, but for the inputs, which no converter looks at."""
    width, shapes = 3072, {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        shapes |= {
            f"{block}_attn.qkv": 3 * width,
            f"{block}_attn.proj": width,
            f"{block}_mlp.0": 4 * width,
        }
        shapes |= {f"{block}_mlp.2": width, f"{block}_mod.lin": 6 * width}
    shapes |= {"single_blocks.0.linear1": 7 * width, "single_blocks.0.linear2": width}
    shapes |= {"single_blocks.0.modulation.lin": 3 * width, "img_in": width, "txt_in": width}
    shapes |= {
        f"{name}.{half}_layer": width
        for name in ("time_in", "vector_in", "guidance_in")
        for half in ("in", "out")
    }
    shapes |= {"final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * width}
    return {name: (rows, columns) for name, rows in shapes.items()}


NORMS = {
    "sd3": [
        "pos_embed",
        *(f"joint_blocks.0.{s}_block.attn.ln_{x}.weight" for s in ("x", "context") for x in "qk"),
    ],
    "flux": [
        *(
            f"double_blocks.0.{s}_attn.norm.{x}_norm.scale"
            for s in ("img", "txt")
            for x in ("query", "key")
        ),
        *(f"single_blocks.0.norm.{x}_norm.scale" for x in ("query", "key")),
    ],
}
CONVERTERS = {
    "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": convert_flux_transformer_checkpoint_to_diffusers,
}


def converted(shapes, weights, name):
    """Weights of released layers, zero where none is given, as diffusers reads a released
    checkpoint."""
    state = {f"{key}.weight": weights.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    state |= {f"{key}.bias": torch.zeros(shape[0]) for key, shape in shapes.items()}
    state |= {key: torch.zeros(1) for key in NORMS[name]}
    if name == "sd3":
        state |= {
            key.replace(".attn.", ".attn2."): torch.zeros(1)
            for key in NORMS["sd3"]
            if ".x_block.attn." in key
        }
        state |= {
            key.replace("joint_blocks.0", "joint_blocks.1"): torch.zeros(1)
            for key in NORMS["sd3"][1:]
        }
    found = CONVERTERS[name](state)
    return {
        f"transformer.{key.removesuffix('.weight')}": w for key, w in found.items() if w.ndim > 1
    }


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_released_models_get_the_updates_that_diffusers_would(name):
    """ComfyUI adds `lora_unet_LAYER` to the layer of the released model; diffusers' converter of
    released checkpoints then says what that is in diffusers' layers."""
    shapes = released_sd3(2) if name == "sd3" else released_flux()
    zeros = converted(shapes, {}, name)
    layers = {key: len(weight) for key, weight in zeros.items()}
    lora = random_lora(layers, {key: weight.shape[1:] for key, weight in zeros.items()})
    state = to_kohya(lora, layers, denoiser_names(layers, name))
    weights = {}
    for key, shape in shapes.items():
        stem = "lora_unet_" + key.replace(".", "_")
        down, up = state.pop(f"{stem}.lora_down.weight"), state.pop(f"{stem}.lora_up.weight")
        weights[key] = (
            state.pop(f"{stem}.alpha") / len(down) * up.flatten(1) @ down.flatten(1)
        ).view(shape)
    assert not state
    found = converted(shapes, weights, name)
    check({key: weight.flatten(1) for key, weight in found.items()}, products(lora))


def test_diffusers_reader_of_sd_scripts_flux_files_finds_every_update_at_full_width():
    zeros = converted(released_flux(), {}, "flux")
    layers = {key: len(w) for key, w in zeros.items() if "blocks." in key and ".norm" not in key}
    lora = random_lora(layers, {key: zeros[key].shape[1:] for key in layers})
    found = _convert_kohya_flux_lora_to_diffusers(
        to_kohya(lora, layers, denoiser_names(layers, "flux"))
    )
    stems = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    check(
        {stem: found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"] for stem in stems},
        products(lora),
    )
