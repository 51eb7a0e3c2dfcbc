"""Pipelines with random weights in the true diffusers layout, and photos."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from benchmark.sizes import CLIP_TOKENS, SIZES, Size, latent_shape
from reference.models import (
    CLIP,
    PIPELINES,
    TextShape,
    flow_parts,
    make_clip,
    make_t5,
    sd15_parts,
    text_parts,
)


def make_base(family: str, size: str, folder: Path, device: torch.device) -> None:
    """Write the pipeline's folder anew.

    At true size the weights are drawn on the device, in bfloat16.
    """
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if size == "true" else dtype)
    try:
        with device if size == "true" else torch.device("cpu"):
            parts = make_parts(family, SIZES[family][size])
    finally:
        torch.set_default_dtype(dtype)
    PIPELINES[family](**parts).save_pretrained(folder)


def make_parts(family: str, size: Size) -> dict[str, Any]:
    """The components of a pipeline by their names."""
    return {"sd15": make_sd15, "sd3": make_sd3, "flux": make_flux}[family](size)


def make_sd15(size: Size) -> dict[str, Any]:
    vae = make_vae("sd15", size, scale=0.18215)
    return sd15_parts(new_denoiser("sd15", size), vae, text_parts(sized_clip(size, size.clip)))


def make_sd3(size: Size) -> dict[str, Any]:
    vae = make_vae("sd3", size, scale=1.5305, shift=0.0609)
    clips = sized_clip(size, size.clip, True), sized_clip(size, size.clip_2, True)
    return flow_parts(new_denoiser("sd3", size), vae, text_parts(*clips, sized_t5(size)))


def make_flux(size: Size) -> dict[str, Any]:
    vae = make_vae("flux", size, scale=0.3611, shift=0.1159)
    texts = text_parts(sized_clip(size, size.clip), sized_t5(size))
    return flow_parts(new_denoiser("flux", size), vae, texts)


def new_denoiser(family: str, size: Size) -> nn.Module:
    """The family's denoiser with random weights, on torch's default device and of its dtype."""
    return {"sd15": new_unet, "sd3": new_sd3, "flux": new_flux}[family](size)


def new_unet(size: Size) -> UNet2DConditionModel:
    shape = size.denoiser
    num_levels = len(shape["block_out_channels"])
    return UNet2DConditionModel(
        sample_size=size.resolution // 8,
        block_out_channels=shape["block_out_channels"],
        down_block_types=("CrossAttnDownBlock2D",) * (num_levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (num_levels - 1),
        norm_num_groups=math.gcd(32, *shape["block_out_channels"]),
        cross_attention_dim=shape["cross_attention_dim"],
        attention_head_dim=shape["heads"],
    )


def new_sd3(size: Size) -> SD3Transformer2DModel:
    shape = size.denoiser
    return SD3Transformer2DModel(
        sample_size=size.resolution // 8,
        in_channels=16,
        out_channels=16,
        num_layers=shape["layers"],
        attention_head_dim=shape["width"],
        num_attention_heads=shape["heads"],
        joint_attention_dim=size.t5.width,
        caption_projection_dim=shape["width"] * shape["heads"],
        pooled_projection_dim=size.clip.width + size.clip_2.width,
        pos_embed_max_size=384 if size.resolution == 1024 else size.resolution // 8,
        dual_attention_layers=tuple(range(shape["dual"])),
        qk_norm="rms_norm",
    )


def new_flux(size: Size) -> FluxTransformer2DModel:
    shape = size.denoiser
    width = shape["width"]
    # the axes add up to the width; those of the tiny heads cannot keep the proportions
    axes = (width // 8, 7 * width // 16, 7 * width // 16) if width > 16 else (4, 6, 6)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape["layers"],
        num_single_layers=shape["single"],
        attention_head_dim=width,
        num_attention_heads=shape["heads"],
        joint_attention_dim=size.t5.width,
        pooled_projection_dim=size.clip.width,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )


def make_vae(family: str, size: Size, scale: float, shift: float | None = None) -> AutoencoderKL:
    """An autoencoder with the family's scale and shift of the latents."""
    has_quant_conv = family == "sd15"
    return AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        layers_per_block=2,
        latent_channels=latent_shape(family, size)[0],
        norm_num_groups=math.gcd(32, *size.vae),
        sample_size=size.resolution,
        use_quant_conv=has_quant_conv,
        use_post_quant_conv=has_quant_conv,
        scaling_factor=scale,
        shift_factor=shift,
    )


def sized_clip(
    size: Size, shape: TextShape, has_projection: bool = False
) -> tuple[CLIP, CLIPTokenizer]:
    tokenizer = make_tokenizer()
    return make_clip(shape, tokenizer, size.vocabularies[0], has_projection), tokenizer


def sized_t5(size: Size) -> tuple[T5EncoderModel, T5Tokenizer]:
    return make_t5(size.t5, size.vocabularies[1]), make_t5_tokenizer()


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's kind that spells every word in letters."""
    letters = [chr(code) for code in range(33, 127)]
    endings = [letter + "</w>" for letter in letters]
    tokens = [*letters, *endings, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def make_t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's kind that spells every word in letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def make_photos(folder: Path, side: int, count: int = 5) -> None:
    """Write JPEGs of twice the side in pixels that is trained on: smooth colors under grain."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    width, height = 5 * side // 2, 2 * side
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        smooth = np.array(rough.resize((width, height)), dtype=np.int16)
        grainy = smooth + rng.integers(-20, 21, (height, width, 1))
        photo = Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{i}.jpg", quality=92)
