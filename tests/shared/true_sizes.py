"""The families at their true sizes: the configs of their parts alone, without a weight."""

import json

from transformers import CLIPTextConfig

from trainers.config import ModelConfig
from trainers.families import FAMILIES

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_G = {
    "hidden_size": 1280,
    "projection_dim": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
}

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
}

# family: the pipeline, its denoiser, and the sizes of its CLIP text encoders
TRUE_SIZES = {
    "sd15": (
        "StableDiffusionPipeline",
        {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768},
        {"text_encoder": ("CLIPTextModel", CLIP_L)},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        SDXL,
        {
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        SD35_MEDIUM,
        {
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
    ),
    "flux": (
        "FluxPipeline",
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        {"text_encoder": ("CLIPTextModel", CLIP_L)},
    ),
}


def true_size_base(folder, name, **denoiser_settings):
    """The family of a base of true size, whose folder has configs alone."""
    pipeline, denoiser, encoders = TRUE_SIZES[name]
    part = FAMILIES[name].denoiser_name
    index = {"_class_name": pipeline, part: ["diffusers", denoiser["_class_name"]]}
    write_json(folder / part / "config.json", denoiser | denoiser_settings)
    for encoder, (kind, sizes) in encoders.items():
        index[encoder] = ["transformers", kind]
        (folder / encoder).mkdir(parents=True)
        CLIPTextConfig(**sizes).save_pretrained(folder / encoder)
    write_json(folder / "model_index.json", index)
    model = ModelConfig(family=name, pretrained_model_name_or_path=str(folder), allow_schnell=True)
    return FAMILIES[name](model)


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
