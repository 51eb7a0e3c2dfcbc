"""Pipelines with random weights in the true diffusers layout, in three sizes, and photos.

tiny: nothing but overhead. true: the released configs. mid: layers of middling width in which a
picture's autoencoder, a prompt's text encoders and a LoRA step of the denoiser cost as in the true
family (`check.costs` counts them):

    SD1.5, 512 px     1.12 : 0.013 : 1.72
    SD3.5-M, 1024 px  4.88 : 2.51 : 26.5
    Flux.1, 1024 px   4.88 : 4.85 : 164
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PROMPT = "a photo of a sks dog"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
JOINT = [
    f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", *ATTENTION)
]
FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
TARGETS = {
    "sd15": ATTENTION,
    "sd3": JOINT,
    "flux": JOINT + FORWARD,
}  # what the diffusers scripts train


@dataclass(frozen=True)
class Size:
    resolution: int
    t5_tokens: int  # a CLIP reads 77
    vae: tuple[int, ...]  # channels
    denoiser: dict
    clip: tuple[int, int, int, int]  # width, layers, heads, inner width
    clip_2: tuple[int, int, int, int] | None = None
    t5: tuple[int, int, int, int] | None = None
    vocabularies: tuple[int, int] = (512, 512)  # of CLIP and T5; the tokenizers use the first 200


CLIP_L, CLIP_G, T5_XXL = (768, 12, 12, 3072), (1280, 32, 20, 5120), (4096, 24, 64, 10240)
VAE, VOCABULARIES = (128, 256, 512, 512), (49408, 32128)
SMALL_CLIP, SMALL_T5, SMALL_VAE = (32, 2, 2, 64), (64, 1, 2, 64), (8, 8, 8, 8)
SIZES = {
    "sd15": {
        "tiny": Size(
            64, 0, SMALL_VAE,
            {"block_out_channels": (16, 32), "cross_attention_dim": 32, "heads": 2},
            SMALL_CLIP,
        ),
        "mid": Size(
            256, 0, (44, 88, 176, 176),
            {"block_out_channels": (128, 256, 320, 320), "cross_attention_dim": 256, "heads": 8},
            (256, 3, 4, 1024),
        ),
        "true": Size(
            512, 0, VAE,
            {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "heads": 8},
            CLIP_L, vocabularies=VOCABULARIES,
        ),
    },
    "sd3": {
        "tiny": Size(
            64, 16, SMALL_VAE, {"layers": 2, "heads": 2, "width": 16, "dual": 1},
            SMALL_CLIP, SMALL_CLIP, SMALL_T5,
        ),
        "mid": Size(
            256, 21, (24, 48, 96, 96), {"layers": 9, "heads": 8, "width": 64, "dual": 5},
            (128, 2, 2, 512), (192, 3, 3, 768), (1024, 9, 16, 2560),
        ),
        "true": Size(
            1024, 256, VAE, {"layers": 24, "heads": 24, "width": 64, "dual": 13},
            CLIP_L, CLIP_G, T5_XXL, VOCABULARIES,
        ),
    },
    "flux": {
        "tiny": Size(
            64, 32, SMALL_VAE, {"layers": 1, "single": 2, "heads": 2, "width": 16},
            SMALL_CLIP, None, SMALL_T5,
        ),
        "mid": Size(
            256, 32, (9, 18, 36, 36), {"layers": 4, "single": 8, "heads": 8, "width": 64},
            (64, 2, 2, 256), None, (512, 8, 8, 1280),
        ),
        "true": Size(
            1024, 512, VAE, {"layers": 19, "single": 38, "heads": 24, "width": 128},
            CLIP_L, None, T5_XXL, VOCABULARIES,
        ),
    },
}  # fmt: skip


def make_base(family: str, size: str, folder: Path, device: torch.device) -> None:
    """The pipeline's folder, anew; at true size the weights are drawn on the device, in
    bfloat16."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if size == "true" else dtype)
    try:
        with device if size == "true" else torch.device("cpu"):
            parts = make_parts(family, SIZES[family][size])
    finally:
        torch.set_default_dtype(dtype)
    pipe: type[DiffusionPipeline] = parts.pop("pipeline")
    pipe(**parts).save_pretrained(folder)


def make_parts(family: str, size: Size) -> dict:
    """The components of a pipeline by their names, and its class as "pipeline"."""
    return {"sd15": make_sd15, "sd3": make_sd3, "flux": make_flux}[family](size)


def make_sd15(size: Size) -> dict:
    levels = len(size.denoiser["block_out_channels"])
    unet = UNet2DConditionModel(
        sample_size=size.resolution // 8,
        block_out_channels=size.denoiser["block_out_channels"],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        norm_num_groups=math.gcd(32, *size.denoiser["block_out_channels"]),
        cross_attention_dim=size.denoiser["cross_attention_dim"],
        attention_head_dim=size.denoiser["heads"],
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "pipeline": StableDiffusionPipeline,
        "vae": make_vae(size, 4, scaling_factor=0.18215),
        "text_encoder": make_clip(size, size.clip, CLIPTextModel),
        "tokenizer": make_tokenizer(),
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def make_sd3(size: Size) -> dict:
    shape = size.denoiser
    transformer = SD3Transformer2DModel(
        sample_size=size.resolution // 8,
        in_channels=16,
        out_channels=16,
        num_layers=shape["layers"],
        attention_head_dim=shape["width"],
        num_attention_heads=shape["heads"],
        joint_attention_dim=size.t5[0],
        caption_projection_dim=shape["width"] * shape["heads"],
        pooled_projection_dim=size.clip[0] + size.clip_2[0],
        pos_embed_max_size=384 if size.resolution == 1024 else size.resolution // 8,
        dual_attention_layers=tuple(range(shape["dual"])),
        qk_norm="rms_norm",
    )
    return {
        "pipeline": StableDiffusion3Pipeline,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": make_vae(size, 16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        "text_encoder": make_clip(size, size.clip, CLIPTextModelWithProjection),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": make_clip(size, size.clip_2, CLIPTextModelWithProjection),
        "tokenizer_2": make_tokenizer(),
        "text_encoder_3": make_t5(size),
        "tokenizer_3": make_t5_tokenizer(),
    }


def make_flux(size: Size) -> dict:
    shape = size.denoiser
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape["layers"],
        num_single_layers=shape["single"],
        attention_head_dim=shape["width"],
        num_attention_heads=shape["heads"],
        joint_attention_dim=size.t5[0],
        pooled_projection_dim=size.clip[0],
        guidance_embeds=True,
        axes_dims_rope=(shape["width"] // 8, *[7 * shape["width"] // 16] * 2)
        if shape["width"] > 16
        else (4, 6, 6),
    )
    return {
        "pipeline": FluxPipeline,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": make_vae(size, 16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        "text_encoder": make_clip(size, size.clip, CLIPTextModel),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": make_t5(size),
        "tokenizer_2": make_t5_tokenizer(),
    }


def make_vae(
    size: Size, channels: int, use_quant_conv: bool = True, **scale: float
) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        layers_per_block=2,
        latent_channels=channels,
        norm_num_groups=math.gcd(32, *size.vae),
        sample_size=size.resolution,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
        **scale,
    )


def make_clip(size: Size, shape: tuple[int, int, int, int], kind: type) -> CLIPTextModel:
    tokenizer = make_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=size.vocabularies[0],
            hidden_size=shape[0],
            intermediate_size=shape[3],
            projection_dim=shape[0],
            num_hidden_layers=shape[1],
            num_attention_heads=shape[2],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(size: Size) -> T5EncoderModel:
    width, layers, heads, inner = size.t5
    return T5EncoderModel(
        T5Config(
            vocab_size=size.vocabularies[1],
            d_model=width,
            d_kv=width // heads,
            d_ff=inner,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def make_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def make_t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=512,
    )


def make_photos(folder: Path, side: int, count: int = 5) -> None:
    """JPEGs twice as wide as what is trained on, smooth colours under grain."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
            (5 * side // 2, 2 * side)
        )
        grain = np.array(rough, dtype=np.int16) + rng.integers(
            -20, 21, (2 * side, 5 * side // 2, 1)
        )
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
