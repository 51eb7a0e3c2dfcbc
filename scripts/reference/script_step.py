"""The training step of diffusers' example scripts, call by call, with latents and prompts cached.

Of train_dreambooth_lora.py, train_dreambooth_lora_sd3.py and train_dreambooth_lora_flux.py of
diffusers 58eb52c, with `--allow_tf32` and their other defaults. What encodes is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor, nn

from reference.step import add_lora

# their default of --weighting_scheme
WEIGHTING = {"sd3": "logit_normal", "flux": "none"}


class ScriptStep:
    """One optimizer step after another, on the same latents and prompt.

    latents: (B, C, h, w) in the denoiser's units; text: what the denoiser takes of the prompts, as
    of `reference.step.encode`; scheduler: the config of the base's.
    """

    def __init__(  # noqa: PLR0913 (all that the scripts' step depends on)
        self,
        family: str,
        denoiser: nn.Module,
        lora: tuple[int, list[str]],
        latents: Tensor,
        text: list[Tensor],
        scheduler: dict[str, Any],
        accelerator: Accelerator,
        has_checkpointing: bool = False,
    ) -> None:
        denoiser.requires_grad_(False)
        if has_checkpointing:
            denoiser.enable_gradient_checkpointing()
        add_lora(denoiser, *lora)
        # in bfloat16 they leave LoRA as it is
        if accelerator.mixed_precision == "fp16":
            cast_training_params([denoiser], dtype=torch.float32)
        self.trained = [p for p in denoiser.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
        rate = get_scheduler("constant", optimizer=optimizer)
        self.dtype = denoiser.dtype
        self.config = denoiser.config
        self.denoiser, self.optimizer, self.rate = accelerator.prepare(denoiser, optimizer, rate)
        self.denoiser.train()
        self.family, self.accelerator = family, accelerator
        self.latents = latents.to(self.dtype)
        self.text = [part.to(self.dtype) for part in text]
        self.text_ids = torch.zeros(text[0].shape[1], 3, device=latents.device, dtype=self.dtype)
        is_ddpm = family == "sd15"
        kind = DDPMScheduler if is_ddpm else FlowMatchEulerDiscreteScheduler
        self.scheduler = kind.from_config(scheduler)

    def __call__(self) -> float:
        """Train a step. Returns its loss, which the scripts log at each."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.denoiser):
            loss = self.ddpm_loss() if self.family == "sd15" else self.flow_loss()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        return loss.detach().item()

    def ddpm_loss(self) -> Tensor:
        noise = torch.randn_like(self.latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(noise),), device=noise.device).long()
        noisy = self.scheduler.add_noise(self.latents, noise, timesteps)
        output = self.denoiser(
            noisy, timesteps, self.text[0], class_labels=None, return_dict=False
        )[0]
        return F.mse_loss(output.float(), noise.float(), reduction="mean")

    def flow_loss(self) -> Tensor:
        noise = torch.randn_like(self.latents)
        u = compute_density_for_timestep_sampling(
            weighting_scheme=WEIGHTING[self.family],
            batch_size=len(noise),
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
        )
        indices = (u * self.scheduler.config.num_train_timesteps).long()
        timesteps = self.scheduler.timesteps[indices].to(device=noise.device)
        sigmas = self.sigmas(timesteps, noise.ndim, noise.dtype)
        noisy = (1.0 - sigmas) * self.latents + sigmas * noise
        predict = self.predict_flux if self.family == "flux" else self.predict_sd3
        output = predict(noisy, timesteps)
        scheme = WEIGHTING[self.family]
        weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
        target = noise - self.latents
        error = weighting.float() * (output.float() - target.float()) ** 2
        return torch.mean(error.reshape(target.shape[0], -1), 1).mean()

    def sigmas(self, timesteps: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
        """The noise levels (B, 1, ...) of timesteps (B,), looked up as the scripts do."""
        device = self.latents.device
        levels = self.scheduler.sigmas.to(device=device, dtype=dtype)
        scheduled = self.scheduler.timesteps.to(device)
        places = [(scheduled == timestep).nonzero().item() for timestep in timesteps]
        sigma = levels[places].flatten()
        while sigma.ndim < ndim:
            sigma = sigma.unsqueeze(-1)
        return sigma

    def predict_sd3(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=self.text[0],
            pooled_projections=self.text[1],
            return_dict=False,
        )[0]

    def predict_flux(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        n, channels, h, w = noisy.shape
        device = noisy.device
        image_ids = FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, device, self.dtype)
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.tensor([1.0], device=device).expand(n)
        output = self.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, n, channels, h, w),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=self.text[1],
            encoder_hidden_states=self.text[0],
            txt_ids=self.text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, 8 * h, 8 * w, 8)
