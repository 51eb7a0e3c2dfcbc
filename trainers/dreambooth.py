"""DreamBooth on any family: LoRA or all weights, with prior preservation (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainers.config import DreamBoothConfig
from trainers.data.crops import choose_crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.pictures import (
    load_class_pictures,
    load_held_out_pictures,
    load_instance_pictures,
)
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.distributed import deepspeed
from trainers.distributed.fsdp import ShardFunction, sharded_parameter_names
from trainers.distributed.trained_weights import trainable_parameters
from trainers.efficiency.apply import configure_blocks, open_family
from trainers.families import Family
from trainers.families.sampling import generate_class_images, write_samples
from trainers.lora import export, proof
from trainers.lora.layers import add_lora
from trainers.publishing import model_card
from trainers.training.loop import StepMetrics, averaged_weights, make_player

STEPS_PRECOMPUTED = 32  # steps whose modulation is computed at once
HELD_OUT_DRAWS = 4  # of time and noise for each held-out photo


class Denoiser(nn.Module):
    """The denoiser, and the text encoders that train, as one callable: what DDP wraps is only ever
    called."""

    def __init__(self, family: Family, text_encoders: Sequence[str]) -> None:
        super().__init__()
        self.family = family
        self.denoiser = family.denoiser
        self.text_encoders = nn.ModuleDict(
            {name: getattr(family.pipe, name) for name in text_encoders}
        )

    def forward(self, x_t: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """text: each text encoder's outputs, or {NAME_ids: (B, L)} of those that train."""
        for name in self.text_encoders:
            text = text | self.family.encode_text(name, text[f"{name}_ids"])
        return self.family.denoise(self.denoiser, x_t, t, text)


class DreamBooth:
    """The task of the loop; see `losses` for its mathematics."""

    def __init__(
        self,
        family: Family,
        encoder: CachedEncoder,
        config: DreamBoothConfig,
        accelerator: Accelerator,
    ) -> None:
        """The family holds its denoiser, and the text encoders if they train."""
        self.family, self.encoder = family, encoder
        self.config, self.accelerator = config, accelerator
        self.attention = config.train.attention
        self.objective = family.make_objective(config.objective, config.data.resolution)
        torch.manual_seed(derive_seed(config.seed, "init"))
        self.module = Denoiser(family, encoder.trained_encoders)
        if config.lora:
            add_lora(family, config.lora, encoder.trained_encoders)
        else:
            self.module.requires_grad_(True)
        family.apply_memory_options()
        configure_blocks(family, config.train, accelerator)
        self.module._ddp_params_and_buffers_to_ignore = sharded_parameter_names(
            self.module, accelerator
        )
        learning_rate = config.optimizer.learning_rate
        text_learning_rate = (
            learning_rate
            if config.optimizer.text_encoder_lr is None
            else config.optimizer.text_encoder_lr
        )
        parts = [
            (self.module.denoiser, learning_rate),
            (self.module.text_encoders, text_learning_rate),
        ]
        groups = [
            {"params": list(trainable_parameters(part).values()), "lr": lr} for part, lr in parts
        ]
        groups = [group for group in groups if group["params"]]
        player = make_player(
            self.module, groups, config.optimizer, config.train.ema_decay, accelerator
        )
        self.players, self.callbacks = {"denoiser": player}, [self.log_held_out_loss]
        self.batches: DreamBoothBatches
        self.held_out_batches: DreamBoothBatches | None = None

    def losses(self, batch: dict, rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """batch: moments (B, 2C, h, w), text {name: (B, ...)}, weight (B,), see `data.Batches`."""
        x0, eps, t = self.draw_inputs(batch, rng)
        x_t = self.objective.corrupt(x0, eps, t)
        if self.family.modulation and self.module.training:
            self.use_precomputed(rng)
        prediction = self.players["denoiser"].module(x_t, t, batch["text"])
        error = (
            (prediction.float() - self.objective.target(x0, eps, t)).square().mean(dim=(1, 2, 3))
        )  # (B,)
        yield "denoiser", (batch["weight"] * self.objective.weight(t) * error).sum()

    def draw_inputs(self, batch: dict, rng: SampleRng) -> tuple[Tensor, Tensor, Tensor]:
        """x0 and eps (B, C, h, w), t (B,)."""
        x0 = self.family.latents(batch["moments"], rng)
        return x0, self.objective.noise(x0, rng), self.objective.times(rng)

    def use_precomputed(self, rng: SampleRng) -> None:
        """Bring what adaptive norms give for this micro-batch; computed for the next steps too,
        when it is lacking."""
        modulation, key = self.family.modulation, (rng.step, rng.rows[0])
        if key not in modulation.precomputed:
            with self.accelerator.autocast():
                modulation.precompute(
                    {
                        other_key: modulation.compute_embedding(self.module, *x)
                        for other_key, x in self.upcoming_inputs(rng.step)
                    }
                )
        modulation.use_precomputed(key)

    def upcoming_inputs(self, first: int) -> Iterator[tuple[Hashable, tuple]]:
        """Key and the denoiser's inputs of this process's micro-batches in the steps from `first`
        on."""
        for step in range(first, first + STEPS_PRECOMPUTED):
            for batch, rng in self.batches(step):
                x0, _, t = self.draw_inputs(batch, rng)
                yield (step, rng.rows[0]), (x0, t, batch["text"])

    @torch.no_grad()
    def log_held_out_loss(self, step: int, metrics: StepMetrics) -> None:
        """Adds the loss on the held-out photos, always by the same times and noise, with averaged
        weights if kept."""
        if self.held_out_batches and step % self.config.validation.validation_steps == 0:
            self.module.eval()
            with averaged_weights(self):
                losses = [
                    loss
                    for batch, rng in self.held_out_batches(0)
                    for _, loss in self.losses(batch, rng)
                ]
            self.module.train()
            metrics["held_out_loss"] = torch.stack(losses).mean()

    @property
    def needs_all_processes(self) -> bool:
        return self.family.memory.is_sharded or deepspeed.zero_stage(self.accelerator) == 3

    def sample(self, folder: Path) -> None:
        """Validation pictures by the weights as they are now; what does not train was encoded
        before the training."""
        if self.config.validation.prompts:
            self.module.eval()
            try:
                write_samples(
                    self.family,
                    self.config,
                    folder,
                    self.encoder.encoder_outputs,
                    self.joint_accelerator,
                )
            finally:
                self.module.train()

    @property
    def joint_accelerator(self) -> Accelerator | None:
        """Who works on one thing together, if not each process alone."""
        return self.accelerator if self.needs_all_processes else None

    def save(self, folder: Path) -> None:
        """LoRA weights, or the whole pipeline when all weights train."""
        if self.config.lora:
            export.save_lora(self.family, self.encoder.trained_encoders, folder, self.config)
        else:
            export.save_pipeline(self.family, self.encoder.trained_encoders, folder / "pipeline")

    def probe_output(self, prompt: str) -> Tensor:
        text = self.encoder.text_inputs(prompt)
        unwrapped = self.accelerator.unwrap_model(
            self.players["denoiser"].module, keep_fp32_wrapper=False
        )
        return proof.probe_denoiser(self.family, self.config.data.resolution, text, unwrapped)

    def finish(self) -> None:
        """Save, prove that the file reloads, sample from it, write the card. The trained model is
        freed on the way."""
        config, family, prompt = self.config, self.family, self.batches.pools[0][0].caption
        is_main, joint_accelerator = self.accelerator.is_main_process, self.joint_accelerator
        with averaged_weights(self):
            self.module.eval()
            with deepspeed.gathered_weights(self.module, self.accelerator):
                if is_main:
                    self.save(config.output_dir)
            expected = self.probe_output(prompt)
        if joint_accelerator:
            joint_accelerator.wait_for_everyone()
        self.players.clear()
        del self.module
        self.accelerator.free_memory()
        family.unload()
        reloaded, encode, difference = proof.verify_export(config, self.encoder, expected, prompt)
        self.accelerator.print(f"reload proof: relative difference {difference:.1e}")
        if config.validation.prompts:
            write_samples(
                reloaded, config, config.output_dir / "samples" / "final", encode, joint_accelerator
            )
        if is_main:
            model_card.write_dreambooth_card(
                config, difference, [picture.digest for picture in self.batches.pools[0]]
            )


def build(
    config: DreamBoothConfig, accelerator: Accelerator, shard: ShardFunction | None = None
) -> tuple[DreamBooth, DreamBoothBatches, str]:
    """The task, its batches and a digest of its data, in stages: encoders and denoiser are never in
    memory together."""
    data, pools = config.data, [load_instance_pictures(config.data)]
    dtype = deepspeed.compute_dtype(accelerator) if config.lora else torch.float32
    family = open_family(config.model, accelerator.device, dtype, shard)
    text_encoders = family.clip_encoders if config.lora else family.text_encoder_names
    text_encoders = text_encoders if config.train.train_text_encoder else ()
    encoder = CachedEncoder(
        family, data.cache_dir or config.output_dir / "cache", data.cache, text_encoders
    )
    if data.uses_prior:
        folder = data.class_data_dir or config.output_dir / "class_images"
        generate_class_images(encoder, config, folder, accelerator)
        pools.append(load_class_pictures(folder, data))
    held_out = load_held_out_pictures(data) if data.held_out_dir else []
    pictures = [*chain(*pools), *held_out]
    if data.cache:
        crops = (
            (picture, choose_crop(picture, v, data))
            for picture in pictures
            for v in range(data.num_variants)
        )
        prompts = [picture.caption for picture in pictures] + config.validation.prompts
        encoder.fill(
            crops, dict.fromkeys([*prompts, config.validation.negative_prompt, ""]), accelerator
        )
    names = [family.denoiser_name]
    names += ["vae"] if config.validation.prompts or not data.cache else []
    family.load(*names, *encoder.loaded_encoders)
    task = DreamBooth(family, encoder, config, accelerator)
    batch_slice = BatchSlice.from_config(config.seed, config.train, accelerator)
    task.batches = DreamBoothBatches(pools, encoder, data, batch_slice, accelerator.device)
    if held_out:
        held_out_slice = BatchSlice(
            derive_seed(config.seed, "held out"), 1, HELD_OUT_DRAWS * len(held_out)
        )
        undropped = data.model_copy(update={"caption_dropout": 0.0})
        task.held_out_batches = DreamBoothBatches(
            [held_out], encoder, undropped, held_out_slice, accelerator.device
        )
    contents = chain.from_iterable((picture.digest, picture.caption) for picture in pools[0])
    return task, task.batches, f"{derive_seed(*contents):x}"
