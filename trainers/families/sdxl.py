"""Stable Diffusion XL: a U-Net, two CLIPs, and sizes as a condition (Podell et al. 2023)."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline

from trainers.data.crops import GEOMETRY
from trainers.families.base import Family
from trainers.families.objectives import DDPM


class SDXL(Family):
    pipeline = StableDiffusionXLPipeline
    denoiser_name = "unet"
    probe_time = 500

    def make_objective(self, config, latent_size):
        return DDPM.from_scheduler(self.pipe.scheduler, config, self.device)

    def encode_text(self, name, ids):
        output = getattr(self.pipe, name)(ids, output_hidden_states=True)
        states = {name: output.hidden_states[-2]}  # (B, 77, 768) and (B, 77, 1280)
        if name == self.clip_encoders[-1]:
            states[f"{name}_pooled"] = output.text_embeds  # (B, 1280)
        return states

    def condition(self, text):
        condition = {
            "encoder_hidden_states": torch.cat([text[name] for name in self.clip_encoders], -1),
            "text_embeds": text[f"{self.clip_encoders[-1]}_pooled"],
        }
        # when it draws, the pipeline has sizes of its own
        if GEOMETRY in text:
            condition["time_ids"] = text[GEOMETRY]
        return condition

    def predict(self, denoiser, x_t, t, condition):
        sizes = condition.get("time_ids")
        if sizes is None:
            # of a picture that has the size of the result and is whole, as the pipeline has it
            h, w = (side * self.vae_scale_factor for side in x_t.shape[-2:])
            sizes = torch.tensor([h, w, 0, 0, h, w], device=x_t.device).expand(len(x_t), 6)
        added = {"text_embeds": condition["text_embeds"], "time_ids": sizes}
        words = condition["encoder_hidden_states"]  # (B, 77, 2048)
        return denoiser(x_t, t, words, added_cond_kwargs=added, return_dict=False)[0]
