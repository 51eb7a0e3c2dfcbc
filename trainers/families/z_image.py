"""Z-Image: one stream of patches and words, whose number is each prompt's own, and a Qwen3.

Its transformer counts time from noise, and regresses what leads to the picture.
"""

from __future__ import annotations

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from trainers.families.base import Condition, Family

LAYER = -2  # of the language model's outputs: the last but one


class ZImage(Family):
    pipeline = ZImagePipeline

    @property
    def max_side(self):
        # positions are looked up in a table with so many patches along each side
        _, *sides = self.denoiser_config["axes_lens"]
        return min(sides) * self.denoiser_config["all_patch_size"][0] * self.vae_scale_factor

    def encode_text(self, name, ids):
        settings = {"output_hidden_states": True, "use_cache": False}
        output = getattr(self.pipe, name)(ids, self.is_word(name, ids), **settings)
        return {name: output.hidden_states[LAYER]}  # (B, L, D)

    def condition(self, text):
        lengths = f"{self.long_encoder}_length"
        own = {"lengths": text[lengths]} if lengths in text else {}
        return {"words": text[self.long_encoder], **own}

    def own_words(self, condition: Condition) -> list[Tensor]:
        """The words (n, D) of each prompt, without what pads them; all, where no number is
        known."""
        rows = list(condition["words"])
        if "lengths" not in condition:
            return rows
        return [row[:n] for row, n in zip(rows, condition["lengths"].tolist(), strict=True)]

    def pipeline_arguments(self, condition):
        return {"prompt_embeds": self.own_words(condition)}

    def predict(self, denoiser, x_t, t, condition):
        frames = list(x_t.unsqueeze(2))  # (C, 1, h, w) each
        time = (1000 - 1000 * t) / 1000  # 1 - t, rounded as in the pipeline
        v = denoiser(frames, time, self.own_words(condition), return_dict=False)[0]
        return -torch.stack(v).squeeze(2)
