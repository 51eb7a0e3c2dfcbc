"""Flux.1: a multimodal transformer over 2 x 2 patches of latents, a CLIP and a T5.

CLIP gives one vector for the whole prompt, and T5 one for each of its tokens.
"""

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
            name = model.pretrained_model_name_or_path
            raise UserError(
                f"model.pretrained_model_name_or_path: {name} has no guidance embedding, like "
                "Flux.1-schnell. It is distilled to few steps, and training would undo the "
                "distillation: use Flux.1-dev, or set model.allow_schnell=true"
            )

    def encode_text(self, name, ids):
        output = getattr(self.pipe, name)(ids)
        if name == self.long_encoder:
            return {name: output.last_hidden_state}  # (B, L, 4096)
        return {name: output.pooler_output}  # (B, 768)

    def condition(self, text):
        return {
            "encoder_hidden_states": text[self.long_encoder],
            "pooled_projections": text["text_encoder"],
        }

    def predict(self, denoiser, x_t, t, condition):
        h, w = (side // 2 for side in x_t.shape[-2:])
        # each token is a patch, flattened in the order (c, dy, dx)
        tokens = F.pixel_unshuffle(x_t, 2).flatten(2).mT  # (B, hw, 4C)
        zero, y, x = (torch.arange(n, device=t.device) for n in (1, h, w))
        positions = torch.cartesian_prod(zero, y, x).to(x_t.dtype)  # (hw, 3)
        v = denoiser(
            tokens,
            timestep=t,  # the transformer multiplies by 1000 itself
            img_ids=positions,
            # words have no place in the picture
            txt_ids=x_t.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance),
            **condition,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(v.mT.unflatten(2, (h, w)), 2)
