"""Text encoders with random weights, and the components of the three families' pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "sd15": StableDiffusionPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
CLIP = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True)
class TextShape:
    """The widths of a text encoder."""

    width: int
    layers: int
    heads: int
    inner: int  # the width inside its feed-forward layers


def make_clip(
    shape: TextShape,
    tokenizer: CLIPTokenizer,
    vocabulary: int | None = None,
    has_projection: bool = False,
) -> CLIP:
    """A CLIP text encoder for the tokens of a tokenizer, of which it may know more."""
    config = CLIPTextConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        projection_dim=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if has_projection else CLIPTextModel(config)


def make_t5(
    shape: TextShape, vocabulary: int, buckets: int = 32, max_distance: int = 128
) -> T5EncoderModel:
    """A T5 encoder; buckets and max_distance (tokens) are of its relative positions."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=shape.width,
            d_kv=shape.width // shape.heads,
            d_ff=shape.inner,
            num_layers=shape.layers,
            num_heads=shape.heads,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=max_distance,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def text_parts(*encoders: tuple[CLIP | T5EncoderModel, Any]) -> dict[str, Any]:
    """Text encoders with their tokenizers under the names that pipelines have for them."""
    parts = {}
    for number, (encoder, tokenizer) in enumerate(encoders, start=1):
        suffix = "" if number == 1 else f"_{number}"
        parts[f"text_encoder{suffix}"] = encoder
        parts[f"tokenizer{suffix}"] = tokenizer
    return parts


def sd15_parts(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    texts: dict[str, Any],
    prediction_type: str = "epsilon",
) -> dict[str, Any]:
    """The components of an SD1.5 pipeline, with the scheduler of the released one."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    no_checker = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return {"vae": vae, "unet": unet, "scheduler": scheduler} | texts | no_checker


def flow_parts(
    transformer: SD3Transformer2DModel | FluxTransformer2DModel,
    vae: AutoencoderKL,
    texts: dict[str, Any],
) -> dict[str, Any]:
    """The components of an SD3 or Flux.1 pipeline, with the scheduler of the released one."""
    is_flux = isinstance(transformer, FluxTransformer2DModel)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_flux)
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae} | texts
