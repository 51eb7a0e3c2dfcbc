"""Tiny pipelines whose prompts a language model reads, in the true diffusers layout."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import AddedToken, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

# what the released template makes of one message of a user, in its own line breaks
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
AUTOENCODER = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 16,
}
WORDS = ("user", "assistant")  # each a token, as in the released vocabulary


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """Each other letter is a token."""
    tokens, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS:
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            tokens.append(word[: i + 1])
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=list(dict.fromkeys(merges)),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    marks = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*marks, AddedToken("<think>"), AddedToken("</think>")])
    return tokenizer


def make_qwen3(kind=Qwen3ForCausalLM, layers: int = 28):
    return kind(
        Qwen3Config(
            vocab_size=len(make_qwen_tokenizer()),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )


def make_flux2_klein(**index: bool) -> Flux2KleinPipeline:
    """index: what model_index.json says besides."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(**AUTOENCODER)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 2)
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=make_qwen3(),
        tokenizer=make_qwen_tokenizer(),
        **index,
    )


def make_z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[640, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL(scaling_factor=0.4, shift_factor=0.2, **AUTOENCODER),
        text_encoder=make_qwen3(Qwen3Model, layers=3),
        tokenizer=make_qwen_tokenizer(),
    )
