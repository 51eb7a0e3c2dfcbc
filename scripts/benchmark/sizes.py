"""The sizes that the families are measured at, and what is trained of them.

tiny: nothing but overhead. true: the released configs. mid: layers of middling width in which a
picture's autoencoder, a prompt's text encoders and a LoRA step of the denoiser cost as in the true
family, as counted by `flops.costs`:

    SD1.5, 512 px     1.12 : 0.013 : 1.72
    SD3.5-M, 1024 px  4.88 : 2.51 : 26.5
    Flux.1, 1024 px   4.88 : 4.85 : 164
"""

from __future__ import annotations

from dataclasses import dataclass

from reference.models import TextShape

PROMPT = "a photo of a sks dog"
RANK = 16
CLIP_TOKENS = 77

# the layers that the scripts of diffusers train
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
JOINT = [
    f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", *ATTENTION)
]
FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
TARGETS = {"sd15": ATTENTION, "sd3": JOINT, "flux": JOINT + FORWARD}


@dataclass(frozen=True)
class Size:
    resolution: int
    t5_tokens: int
    vae: tuple[int, ...]  # channels of its levels
    denoiser: dict
    clip: TextShape
    clip_2: TextShape | None = None
    t5: TextShape | None = None
    vocabularies: tuple[int, int] = (512, 512)  # of CLIP and T5; the tokenizers use the first 200


CLIP_L = TextShape(768, 12, 12, 3072)
CLIP_G = TextShape(1280, 32, 20, 5120)
T5_XXL = TextShape(4096, 24, 64, 10240)
SMALL_CLIP = TextShape(32, 2, 2, 64)
SMALL_T5 = TextShape(64, 1, 2, 64)
VAE = (128, 256, 512, 512)
SMALL_VAE = (8, 8, 8, 8)
VOCABULARIES = (49408, 32128)

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
            TextShape(256, 3, 4, 1024),
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
            TextShape(128, 2, 2, 512), TextShape(192, 3, 3, 768), TextShape(1024, 9, 16, 2560),
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
            TextShape(64, 2, 2, 256), None, TextShape(512, 8, 8, 1280),
        ),
        "true": Size(
            1024, 512, VAE, {"layers": 19, "single": 38, "heads": 24, "width": 128},
            CLIP_L, None, T5_XXL, VOCABULARIES,
        ),
    },
}  # fmt: skip


def latent_shape(family: str, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents."""
    side = size.resolution // 8
    return 4 if family == "sd15" else 16, side, side


def condition_shapes(family: str, size: Size, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what the text encoders give to the denoiser, by its names for them."""
    if family == "sd15":
        return {"encoder_hidden_states": (rows, CLIP_TOKENS, size.clip.width)}
    tokens, pooled = size.t5_tokens, size.clip.width
    if family == "sd3":
        tokens += CLIP_TOKENS
        pooled += size.clip_2.width
    return {
        "encoder_hidden_states": (rows, tokens, size.t5.width),
        "pooled_projections": (rows, pooled),
    }
