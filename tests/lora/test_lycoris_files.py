"""LoKr and LoHa files of other programs: alpha is as in ComfyUI, what fits no layer is refused."""

import pytest
import torch
from safetensors.torch import save_file

from tests.shared.saved_loras import family_of
from trainers.errors import UserError
from trainers.lora.base_layers import adaptable_shapes
from trainers.lora.files import read_lora

STEM = "lora_unet_mid_block_attentions_0_proj_in"  # 16 x 16


@pytest.fixture
def sd15(bases):
    return family_of(bases["sd15"], "sd15")


def written(tmp_path, state):
    tensors = {f"{STEM}.{name}": tensor for name, tensor in state.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    return tmp_path / "file.safetensors"


def test_the_alpha_of_other_programs_counts_as_in_comfyui(sd15, tmp_path):
    shape = adaptable_shapes(sd15)["unet.mid_block.attentions.0.proj_in"]
    rows, columns = shape[0], shape[1]
    w1, w2_a, w2_b = torch.randn(2, 2), torch.randn(rows // 2, 3), torch.randn(3, columns // 2)
    state = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(6.0)}
    (update,) = read_lora(written(tmp_path, state), sd15).values()
    torch.testing.assert_close(update.delta_weight(), 2 * torch.kron(w1, w2_a @ w2_b))
    state = {"lokr_w1": w1, "lokr_w2": w2_a @ w2_b, "alpha": torch.tensor(6.0)}
    (update,) = read_lora(written(tmp_path, state), sd15).values()
    torch.testing.assert_close(update.delta_weight(), torch.kron(w1, w2_a @ w2_b))


BROKEN = {
    "half a factor": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8)}, "lacks a factor of its LoHa"),
    "another rank": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (2, 4)},
        "does not fit together",
    ),
    "another weight": ({"lokr_w1": (2, 2), "lokr_w2": (4, 5)}, "for another weight than the base"),
    "two kinds": ({"lokr_w1": (2, 2), "hada_w1_a": (8, 2)}, "not the tensors of one kind"),
    "Tucker": ({"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3)}, "more than LoKr or LoHa, such as a T"),
    "DoRA": ({"lokr_w1": (2, 2), "lokr_w2": (4, 4), "dora_scale": (8, 1)}, "more than LoKr or"),
}


@pytest.mark.parametrize(("shapes", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_update_of_the_layer_is_refused(sd15, tmp_path, shapes, message):
    path = written(tmp_path, {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=message):
        read_lora(path, sd15)


def test_an_update_of_several_layers_is_refused(bases, tmp_path):
    state = {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2)}
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"is the update of 3 layers of diffusers"):
        read_lora(tmp_path / "file.safetensors", family_of(bases["flux"], "flux"))


def test_numbers_that_are_not_finite_are_refused(sd15, tmp_path):
    state = {"lokr_w1": torch.full((2, 2), float("nan")), "lokr_w2": torch.ones(4, 4)}
    with pytest.raises(UserError, match="NaN or infinite"):
        read_lora(written(tmp_path, state), sd15)
    state = {"hada_w1_a": torch.ones(16, 1), "hada_w1_b": torch.ones(1, 16)}
    state |= {"hada_w2_a": torch.ones(16, 1), "hada_w2_b": torch.ones(1, 16)}
    for alpha, message in ((torch.ones(2), "alpha is one number"), (torch.tensor(1e39), "alpha")):
        with pytest.raises(UserError, match=message):
            read_lora(written(tmp_path, state | {"alpha": alpha}), sd15)
