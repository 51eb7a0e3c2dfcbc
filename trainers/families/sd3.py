"""Stable Diffusion 3 and 3.5: a multimodal transformer, two CLIPs and a T5 (Esser et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from trainers.families.base import Family


class SD3(Family):
    pipeline = StableDiffusion3Pipeline

    @property
    def max_side(self):
        # positions are cut out of a table with so many patches along each side
        patches = self.denoiser_config["pos_embed_max_size"]
        return patches * self.denoiser_config["patch_size"] * self.vae_scale_factor

    def encode_text(self, name, ids):
        encoder = getattr(self.pipe, name)
        if name == self.long_encoder:
            return {name: encoder(ids)[0]}  # (B, L, 4096)
        output = encoder(ids, output_hidden_states=True)
        # the last layer but one (B, 77, C), and the projected token of the end (B, C)
        return {name: output.hidden_states[-2], f"{name}_pooled": output.text_embeds}

    def condition(self, text):
        width = self.denoiser_config["joint_attention_dim"]
        clip = torch.cat([text[name] for name in self.clip_encoders], -1)  # (B, 77, 768 + 1280)
        clip = F.pad(clip, (0, width - clip.shape[-1]))  # (B, 77, 4096)
        t5 = text.get(self.long_encoder)
        # the pipeline puts zeros where the T5 is left out
        if t5 is None:
            t5 = clip.new_zeros(len(clip), self.max_sequence_length, width)
        pooled = [text[f"{name}_pooled"] for name in self.clip_encoders]
        return {
            "encoder_hidden_states": torch.cat([clip, t5], 1),  # (B, 77 + L, 4096)
            "pooled_projections": torch.cat(pooled, -1),  # (B, 2048)
        }

    def predict(self, denoiser, x_t, t, condition):
        return denoiser(x_t, timestep=1000 * t, **condition, return_dict=False)[0]
