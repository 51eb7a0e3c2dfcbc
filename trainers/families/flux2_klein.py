"""Flux.2-klein: a multimodal transformer over 2 x 2 patches of latents, and a Qwen3 of which three
layers give the words."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from trainers.data.file_digests import part_files
from trainers.data.transfer import send
from trainers.errors import UserError
from trainers.families.base import Family
from trainers.tensor_file import read_tensor

LAYERS = 9, 18, 27  # of the language model, whose outputs the transformer reads
STEPS = 50  # of the pipeline unless it is told otherwise; it shifts less where there are fewer


class Flux2Klein(Family):
    pipeline = Flux2KleinPipeline

    def __init__(self, model, device="cpu", dtype=torch.float32, memory=None):
        super().__init__(model, device, dtype, memory)
        if self.pipeline.load_config(self.folder).get("is_distilled"):
            raise UserError(
                f"model.pretrained_model_name_or_path: {model.pretrained_model_name_or_path} is "
                "distilled to few steps, and training would undo the distillation: train on "
                "black-forest-labs/FLUX.2-klein-base-4B or 9B; the LoRA loads on both"
            )

    def scheduler_shift(self, tokens):
        if not self.pipe.scheduler.config.use_dynamic_shifting:
            return super().scheduler_shift(tokens)
        return math.exp(compute_empirical_mu(tokens, STEPS))

    def encode_text(self, name, ids):
        # without the head that guesses words
        encoder = getattr(self.pipe, name).base_model
        settings = {"output_hidden_states": True, "use_cache": False}
        states = encoder(ids, self.is_word(name, ids), **settings).hidden_states
        return {name: torch.cat([states[layer] for layer in LAYERS], -1)}  # (B, L, 3 D)

    def condition(self, text):
        return {"encoder_hidden_states": text[self.long_encoder]}

    @cached_property
    def patch_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (4C, 1, 1) of patches of latents; they are weights of the
        autoencoder, which is not loaded in training."""
        files = list(part_files(self.folder / "vae", self.variant))
        mean, variance = (read_tensor(files, f"bn.running_{name}") for name in ("mean", "var"))
        std = (variance.float() + self.vae_config["batch_norm_eps"]).sqrt()
        return tuple(send(value.float().view(-1, 1, 1), self.device) for value in (mean, std))

    def normalize(self, z):
        mean, std = self.patch_statistics
        return F.pixel_shuffle((F.pixel_unshuffle(z, 2) - mean) / std, 2)

    def predict(self, denoiser, x_t, t, condition):
        h, w = (side // 2 for side in x_t.shape[-2:])
        # each token is a patch, flattened in the order (c, dy, dx)
        tokens = F.pixel_unshuffle(x_t, 2).flatten(2).mT  # (B, hw, 4C)
        words = condition["encoder_hidden_states"]
        zero, y, x, line = (torch.arange(n, device=t.device) for n in (1, h, w, words.shape[1]))
        v = denoiser(
            tokens,
            words,
            timestep=t,  # the transformer multiplies by 1000 itself
            img_ids=torch.cartesian_prod(zero, y, x, zero),  # (hw, 4)
            txt_ids=torch.cartesian_prod(zero, zero, zero, line),  # (L, 4)
            return_dict=False,
        )[0]
        return F.pixel_shuffle(v.mT.unflatten(2, (h, w)), 2)
