"""Stable Diffusion 1.5: a U-Net and one CLIP text encoder (Rombach et al. 2022)."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from trainers.families.base import Family
from trainers.families.objectives import DDPM


class SD15(Family):
    pipeline = StableDiffusionPipeline
    denoiser_name = "unet"
    probe_time = 500

    def make_objective(self, config, latent_size):
        return DDPM.from_scheduler(self.pipe.scheduler, config, self.device)

    def encode_text(self, name, ids):
        return {name: self.pipe.text_encoder(ids)[0]}  # (B, 77, 768)

    def condition(self, text):
        return {"encoder_hidden_states": text["text_encoder"]}

    def predict(self, denoiser, x_t, t, condition):
        return denoiser(x_t, t, **condition, return_dict=False)[0]
