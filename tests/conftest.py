"""Tiny pipelines with random weights in the true diffusers layout, pictures, and the config of a
short run."""

import gc
import io
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from local_hub import local_hub  # noqa: F401
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

from trainers.config import loading

torch.set_num_threads(1)


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
        pos_embed_max_size=8,
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


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """`Family.unload` collects garbage; without what the imports left, that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


MAKERS = {"sd15": make_sd15, "sd3": make_sd3, "flux": make_flux}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family name -> folder of its tiny pipeline."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in folders.items():
        MAKERS[name]().save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def base(bases):
    return bases["sd15"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    r = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(r.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    """Folder of train.parquet and test.parquet: a bar in the upper half of 16 px is class 0, else
    1."""
    folder, rng = tmp_path_factory.mktemp("bars"), np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 40)):
        rows = {"image": [], "label": []}
        for i in range(count):
            picture, at, buffer = (
                np.zeros((16, 16), np.uint8),
                rng.integers(0, 6) + 8 * (i % 2),
                io.BytesIO(),
            )
            picture[at : at + 2] = rng.integers(150, 255)
            Image.fromarray(picture).save(buffer, "png")
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["label"].append(i % 2)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def blobs(tmp_path_factory):
    """Folder of eight pictures of several sizes, a bright disc in colour on a dark ground, as
    NAME_image.png; where the disc is, 0 or 255, as NAME_mask.png; its colours swapped, as
    NAME_target.png."""
    folder, rng = tmp_path_factory.mktemp("blobs"), np.random.default_rng(0)
    for i in range(8):
        height, width = 20 + i, 28 - i
        at = np.indices((height, width)) - rng.integers(7, 13, (2, 1, 1))
        disc = np.hypot(*at) < rng.uniform(4, 7)
        picture = rng.integers(0, 60, (height, width, 3)) + disc[..., None] * [180, 90, 20]
        for name, array in (
            ("image", picture),
            ("mask", 255 * disc),
            ("target", picture[..., ::-1]),
        ):
            Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}_{name}.png")
    return folder


@pytest.fixture
def settings(bases, photos, tmp_path):
    """A function: overrides, family -> Config of a six-step run on that family's tiny pipeline."""

    def make(*overrides, family="sd15"):
        path = tmp_path / "config.yaml"
        model = f"family: {family}, pretrained_model_name_or_path: {bases[family]}"
        if family != "sd15":
            model += ", max_sequence_length: 10"
        path.write_text(
            f"""
output_dir: {tmp_path}/run
model: {{{model}}}
lora: {{rank: 2}}
data: {{instance_data_dir: {photos}, instance_prompt: a b c, resolution: 16}}
optimizer: {{learning_rate: 1e-2}}
train: {{max_train_steps: 6, train_batch_size: 2}}
checkpoint: {{checkpointing_steps: 2}}
validation: {{num_inference_steps: 2, guidance_scale: 2}}
tracking: {{report_to: [], log_every: 1}}
"""
        )
        return loading.load_config(path, overrides)

    return make
