"""Flux.1: a multimodal transformer over 2 x 2 patches of latents, a CLIP for the prompt and a T5
for its words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from trainers.errors import UserError
from trainers.families.base import Family


class Flux(Family):
    pipeline = FluxPipeline

    def __init__(self, model, device="cpu", dtype=torch.float32, memory=None):
        super().__init__(model, device, dtype, memory)
        self.guidance = model.guidance_scale if self.denoiser_config["guidance_embeds"] else None
        if self.guidance is None and not model.allow_schnell:
            raise UserError(
                f"model.pretrained_model_name_or_path: {model.pretrained_model_name_or_path} has "
                f"no guidance "
                "embedding, as Flux.1-schnell. It was distilled to few steps, which training "
                "undoes: train on "
                "Flux.1-dev, or set model.allow_schnell=true"
            )

    def encode_text(self, name, ids):
        output = getattr(self.pipe, name)(ids)
        return {name: output.last_hidden_state if name == self.t5_encoder else output.pooler_output}

    def condition(self, text):
        return {
            "encoder_hidden_states": text[self.t5_encoder],
            "pooled_projections": text["text_encoder"],
        }

    def predict(self, denoiser, x_t, t, condition):
        h, w = (side // 2 for side in x_t.shape[-2:])
        tokens = F.pixel_unshuffle(x_t, 2).flatten(2).mT  # (B, hw, 4C), within a token (c, dy, dx)
        zero, y, x = (torch.arange(n, device=t.device) for n in (1, h, w))
        v = denoiser(
            tokens,
            timestep=t,  # the transformer multiplies by 1000 itself
            img_ids=torch.cartesian_prod(zero, y, x).to(x_t.dtype),  # (hw, 3)
            txt_ids=x_t.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance),
            **condition,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(v.mT.unflatten(2, (h, w)), 2)
