"""LoRA files from elsewhere: what is broken, or something else, is refused in a sentence that says
what it is; nothing of a file is left out."""

import math

import pytest
import torch
from safetensors.torch import save_file

from tests.shared.lora_files import CONVOLUTION, KEY, QUERY, pair
from trainers.errors import UserError
from trainers.lora.base_layers import adaptable_shapes
from trainers.lora.files import read_lora

# The container


def test_a_file_that_is_cut_anywhere_is_refused(refused, tmp_path):
    save_file(pair(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        message = refused(whole[:length])
        assert "safetensors file" in message or "broken off" in message, (length, message)


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"PK\x03\x04" + bytes(100), "PyTorch file"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (bytes(range(256)) * 4, "not a safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{" + bytes(100), "broken off"),
        ((9).to_bytes(8, "little") + b"{" * 9, "not JSON"),
        ((20000).to_bytes(8, "little") + b'{"a":' * 4000, "not JSON"),
        ((2).to_bytes(8, "little") + b"{}", "no tensor"),
    ],
)
def test_what_is_not_safetensors_is_named(refused, content, meaning):
    assert meaning in refused(content)
    # the ending of the name decides nothing
    assert meaning in refused(content, name="lora.pt")


def test_a_header_with_a_name_twice_is_refused(refused):
    entry = '"x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    assert "stands twice" in refused(len(header).to_bytes(8, "little") + header + bytes(4))


def test_any_length_of_a_header_is_read(family, tmp_path):
    """The first byte of a file is a part of that length, and may be that of another format."""
    for length in range(64):
        save_file(pair(), tmp_path / "file.safetensors", {"note": "x" * length})
        assert read_lora(tmp_path / "file.safetensors", family).keys() == {QUERY}


def test_a_folder_and_an_absent_path_are_refused(family, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="there is no"):
            read_lora(path, family)


# Pairs, shapes and numbers


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [
        ({f"{QUERY}.lora_B.weight": None}, "without the layer's other half (B)"),
        ({f"{QUERY}.lora_A.weight": None}, "without the layer's other half (A)"),
        ({f"{KEY}.alpha": torch.tensor(1.0)}, "without the layer's other half"),
        (pair(rank=0), "at least 1"),
        ({f"{QUERY}.lora_B.weight": torch.ones(8, 3)}, "rank 2 in A [2, 8] and rank 3 in B [8, 3]"),
        (pair(inputs=1024), "a model of width 1024 (SD2.x?), the base has 8"),
        (pair(KEY, inputs=5), "a model of width 5, the base has 16"),
        (pair(outputs=9), "it has 9 outputs, the base has 8"),
        ({f"{QUERY}.lora_A.weight": torch.ones(8)}, "other shapes"),
        ({f"{QUERY}.lora_A.weight": torch.tensor(1.0)}, "other shapes"),
        ({f"{QUERY}.lora_A.weight": torch.ones(2, 8, 3, 3)}, "its kernel is another one"),
        ({f"{QUERY}.alpha": torch.ones(2)}, "alpha is one number"),
        ({f"{QUERY}.alpha": torch.ones(0)}, "alpha is one number"),
        ({f"{QUERY}.alpha": torch.tensor(math.nan)}, "NaN or infinite"),
        ({f"{QUERY}.alpha": torch.tensor(math.inf)}, "NaN or infinite"),
        ({f"{QUERY}.lora_A.weight": torch.full((2, 8), math.nan)}, "16 of 16 numbers"),
        ({f"{QUERY}.lora_B.weight": torch.full((8, 2), -math.inf)}, "NaN or infinite"),
        ({f"{QUERY}.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)}, "of type I8"),
        ({f"{QUERY}.lora_B.weight": torch.ones(8, 2, dtype=torch.bool)}, "of type BOOL"),
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(9)}, "each of the layer's 8 outputs"),
        ({f"{QUERY}.lora_magnitude_vector": torch.full((8,), math.nan)}, "NaN or infinite"),
        ({f"{QUERY}.lora_down.weight": torch.ones(2, 8)}, "same tensor of a layer"),
        (
            {
                "lora_" + QUERY.replace(".", "_") + f".lora_{half}.weight": torch.ones(shape)
                for half, shape in (("down", (2, 8)), ("up", (8, 2)))
            },
            "are the same layer",
        ),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(refused, changes, meaning):
    state = {key: value for key, value in (pair() | changes).items() if value is not None}
    message = refused(state)
    assert meaning in message
    assert "unet" in message


def test_a_file_of_dora_has_a_magnitude_for_each_layer(refused):
    state = pair() | pair(KEY, inputs=16) | {f"{QUERY}.lora_magnitude_vector": torch.ones(8)}
    assert "1 of 2 layers of unet have no magnitude" in refused(state)


def test_tensors_of_no_layer_are_counted_and_named(refused):
    state = pair() | pair("unet.nowhere") | {"note": torch.ones(1)}
    message = refused(state)
    assert "3 of 5 tensors are of layers that are not in this base model" in message
    assert "unet.nowhere.lora_A.weight" in message


def test_the_width_of_another_model_counts_more_than_its_further_layers(refused):
    """SD2.1 has the layers of SD1.5, a wider text encoder, and more of its layers."""
    layer = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"
    state = {}
    for number in range(23):
        state[layer.format(number) + ".lora_down.weight"] = torch.ones(2, 1024)
        state[layer.format(number) + ".lora_up.weight"] = torch.ones(1024, 2)
    message = refused(state)
    assert "this LoRA is for a model of width 1024 (SD2.x?), the base has 16" in message
    assert "42 tensors are of layers that the base lacks" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_any_floating_point_is_read(family, tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in pair().items()}
    save_file(state, tmp_path / "file.safetensors")
    (update,) = read_lora(tmp_path / "file.safetensors", family).values()
    assert update.a.dtype == update.b.dtype == torch.float32
    assert torch.equal(update.delta_weight(), torch.full((8, 8), 2.0))


@pytest.mark.parametrize("alpha", [torch.tensor(1), torch.tensor([1.0]), torch.ones(1, 1)])
def test_an_alpha_of_any_form_is_one_number(family, tmp_path, alpha):
    save_file(pair() | {f"{QUERY}.alpha": alpha}, tmp_path / "file.safetensors")
    (update,) = read_lora(tmp_path / "file.safetensors", family).values()
    assert torch.equal(update.delta_weight(), torch.ones(8, 8))


@pytest.mark.parametrize("name", [CONVOLUTION, QUERY])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_a_1x1_kernel_may_be_there_or_not(family, tmp_path, name, kernel):
    state = {key: value.reshape(*value.shape, *kernel) for key, value in pair(name).items()}
    save_file(state, tmp_path / "file.safetensors")
    (update,) = read_lora(tmp_path / "file.safetensors", family).values()
    dimensions = len(adaptable_shapes(family)[name])
    assert update.a.ndim == update.b.ndim == dimensions
    assert torch.equal(update.delta_weight(), torch.full((8, 8), 2.0))


# What is no LoRA


KOHYA = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("names", "meaning"),
    [
        ([f"{KOHYA}.oft_blocks"], "an OFT"),
        (["unet.conv_in.oft_R.weight"], "an OFT"),
        ([f"{KOHYA}.a1.weight"], "a GLoRA"),
        ([f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_mid.weight"], "Tucker"),
        ([f"{KOHYA}.lora_down.weight", f"{KOHYA}.dora_scale"], "dora_scale"),
        ([f"{KOHYA}.lora_down.weight", f"{KOHYA}.diff_b"], "biases"),
        (["unet.conv_in.lora_B.bias"], "biases"),
        ([f"{KOHYA}.diff"], "whole differences"),
        (["bundle_emb.sks.string_to_param.*", f"{KOHYA}.lora_up.weight"], "embeddings bundled"),
        (["img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"], "a control LoRA"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x.weight"], "a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["emb_params"], "a textual inversion"),
        (["<sks>"], "a textual inversion"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["model.diffusion_model.out.2.weight", "first_stage_model.x"], "a full checkpoint"),
        (["double_blocks.0.img_attn.norm.key_norm.scale", "x.weight"], "a whole denoiser"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a whole denoiser"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a whole VAE"),
        (["text_model.embeddings.position_ids"], "a whole text encoder"),
        (["something"], "a file of other tensors"),
    ],
)
def test_a_refusal_says_what_the_file_is(refused, names, meaning):
    message = refused({name: torch.ones(2, 2) for name in names})
    assert meaning in message
    assert f"of {len(names)} tensors" in message


def test_an_embedding_with_the_name_of_its_word_is_recognized(refused):
    assert "a textual inversion" in refused({"my-dog": torch.ones(4, 768)})
    assert "a file of other tensors" in refused({"my-dog": torch.ones(4, 500)})
