"""Tiny pipelines with random weights in the true diffusers layout."""

from collections.abc import Mapping

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.shared.tiny_language_models import make_flux2_klein, make_z_image


def make_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12
    )


def make_t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=512,
    )


def make_clip(kind=CLIPTextModel, width: int = 16) -> CLIPTextModel:
    tokenizer = make_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(width: int = 32, inner: int = 32, layers: int = 1) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(make_t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=inner,
            num_layers=layers,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def make_vae(**scale: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        **scale,
    )


def make_sd15(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=make_vae(scaling_factor=0.7),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl(**scheduler: object) -> StableDiffusionXLPipeline:
    """scheduler: settings that differ from those of the released base."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16 + 8,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    released = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    return StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.6),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_clip(CLIPTextModelWithProjection, 8),
        tokenizer_2=make_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**released | scheduler),
    )


def make_sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(scaling_factor=1.5, shift_factor=0.3),
        text_encoder=make_clip(CLIPTextModelWithProjection, 16),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_clip(CLIPTextModelWithProjection, 8),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=make_t5(),
        tokenizer_3=make_t5_tokenizer(),
    )


def make_flux(guidance_embeds: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(scaling_factor=0.4, shift_factor=0.2),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_t5(),
        tokenizer_2=make_t5_tokenizer(),
    )


MAKERS = {
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "sd3": make_sd3,
    "flux": make_flux,
    "flux2_klein": make_flux2_klein,
    "z_image": make_z_image,
}


class SavedPipelines(Mapping):
    """Family name -> folder of its tiny pipeline, which is written when it is first asked for."""

    def __init__(self, make_folder):
        """make_folder: of a name, makes an empty folder."""
        self.make_folder, self.folders = make_folder, {}

    def __getitem__(self, name):
        if name not in self.folders:
            folder = self.make_folder(name)
            with torch.random.fork_rng():
                MAKERS[name]().save_pretrained(folder)
            self.folders[name] = folder
        return self.folders[name]

    def __iter__(self):
        return iter(MAKERS)

    def __len__(self):
        return len(MAKERS)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family name -> folder of its tiny pipeline."""
    return SavedPipelines(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def base(bases):
    return bases["sd15"]
