"""DreamBooth on any family: LoRA or all weights, with prior preservation (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.dreambooth_batches import DreamBoothBatches, passes
from trainers.data.rng import SampleRng, derive_seed
from trainers.distributed import deepspeed
from trainers.distributed.fsdp import ShardFunction, sharded_parameter_names
from trainers.efficiency.apply import configure_blocks, open_family
from trainers.encoded_pictures import prepare_batches
from trainers.families import Family
from trainers.families.held_out_loss import HeldOutLoss
from trainers.families.sampling import write_samples
from trainers.families.trainable import TrainableDenoiser
from trainers.lora import export, initial, proof
from trainers.lora.layers import predict_base
from trainers.lora.likeness import Likeness, make_likeness
from trainers.publishing import model_card
from trainers.run_folder import FINAL, PIPELINE, SAMPLES
from trainers.training.facts import HELD_OUT, INITIAL_LORA, Facts
from trainers.training.loop import Callback, averaged_weights, evaluation_mode, make_player
from trainers.training.picture_facts import describe_pools

STEPS_PRECOMPUTED = 32  # steps whose modulation is computed at once


class DreamBooth:
    """The task of the loop; `losses` is its mathematics."""

    def __init__(
        self,
        family: Family,
        batches: DreamBoothBatches,
        held_out: HeldOutLoss,
        config: DreamBoothConfig,
        accelerator: Accelerator,
    ) -> None:
        """The family must hold its denoiser, and the text encoders if they train."""
        self.family = family
        self.encoder = encoder = batches.encoder
        self.batches, self.held_out = batches, held_out
        self.likeness: Likeness | None = None
        self.config, self.accelerator = config, accelerator
        self.attention = config.train.attention
        # of one shape of latents: the shift of a flow depends on it
        self.objective = lru_cache(partial(family.make_objective, config.objective))
        # LoRA draws its start from the global generator
        torch.manual_seed(derive_seed(config.seed, "init"))
        self.module = TrainableDenoiser(family, encoder.trained_encoders)
        self.initial_lora = initial.start_lora(family, config.lora, encoder.trained_encoders)
        if config.lora is None:
            self.module.requires_grad_(True)
        self.module.freeze_unread_layers()
        family.apply_memory_options()
        configure_blocks(family, config.train, accelerator)
        self.module.exclude_from_ddp(sharded_parameter_names(self.module, accelerator))
        groups = self.module.parameter_groups(config.optimizer)
        ema_decay = config.train.ema_decay
        player = make_player(self.module, groups, config.optimizer, ema_decay, accelerator)
        self.players = {"denoiser": player}
        self.callbacks: list[Callback] = []

    def losses(self, batch: dict, rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """Yield the weighted error; `DreamBoothBatches` gives the shapes in `batch`."""
        x0, eps, t = self.draw_inputs(batch, rng)
        objective, mask = self.objective(x0.shape[-2:]), batch.get("mask")
        x_t = objective.corrupt(x0, objective.perturbed(eps, rng), t)
        own, *kept = passes(batch, rng, x_t, t)
        base = [self.predict(*last, is_base=True) for last in kept]  # of the last rows, if any
        prediction = self.predict(*own)
        # (B,); a named target would stay in memory until the backward pass is over
        error = objective.error(t, prediction, objective.target(x0, eps, t), mask, *base)
        yield "denoiser", (batch["weight"] * objective.weight(t) * error).sum()

    def predict(self, key: Hashable, inputs: tuple, is_base: bool = False) -> Tensor:
        """(B, C, h, w), of one of the `passes`; is_base: without LoRA and gradients."""
        if self.family.modulation and self.module.training:
            with self.accelerator.autocast():
                self.family.modulation.use(key, self.module, self.upcoming_inputs(key[0]))
        module = self.players["denoiser"].module
        return predict_base(module, inputs) if is_base else module(*inputs)

    def draw_inputs(self, batch: dict, rng: SampleRng) -> tuple[Tensor, Tensor, Tensor]:
        """Draw x0 and eps (B, C, h, w), and t (B,)."""
        x0 = self.family.latents(batch["moments"], rng)
        objective = self.objective(x0.shape[-2:])
        return x0, objective.noise(x0, rng), objective.times(rng)

    def upcoming_inputs(self, first: int) -> Iterator[tuple[Hashable, tuple]]:
        """The key and the denoiser's inputs of this process's micro-batches from step `first`."""
        for step in range(first, first + STEPS_PRECOMPUTED):
            for batch, rng in self.batches(step):
                x0, _, t = self.draw_inputs(batch, rng)
                # the modulation depends on times and prompts alone, so x0 stands for x_t
                yield from passes(batch, rng, x0, t)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        with evaluation_mode(self.module):
            values = self.held_out.measure(self.losses, self.draw_inputs, self.objective)
            joint = self.joint_accelerator
            if self.likeness and (joint or self.accelerator.is_main_process):
                values |= self.likeness.measure(joint)
        return values

    @property
    def needs_all_processes(self) -> bool:
        """Whether every process must take part in a forward pass."""
        is_sharded = self.family.memory.shard is not None
        return is_sharded or deepspeed.zero_stage(self.accelerator) == 3

    @property
    def joint_accelerator(self) -> Accelerator | None:
        """The accelerator of the processes that sample together; None if each works alone."""
        return self.accelerator if self.needs_all_processes else None

    def sample(self, folder: Path) -> None:
        """Write the validation pictures of the weights as they are now."""
        if not self.config.validation.prompts:
            return
        encode = self.encoder.encoder_outputs
        with evaluation_mode(self.module):
            write_samples(self.family, self.config, folder, encode, self.joint_accelerator)

    def save(self, folder: Path) -> None:
        """Write the LoRA weights, or the whole pipeline when all weights train."""
        if self.config.lora:
            export.save_lora(self.family, self.encoder.trained_encoders, folder, self.config)
        else:
            export.save_pipeline(self.family, self.encoder.trained_encoders, folder / PIPELINE)

    def probe_output(self, prompt: str) -> Tensor:
        """The output that the reloaded weights must reproduce, see `lora.proof`."""
        text = self.encoder.text_inputs(prompt)
        module = self.players["denoiser"].module
        unwrapped = self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        return proof.probe_denoiser(self.family, self.config.data.max_resolution, text, unwrapped)

    def finish(self, steps: int) -> None:
        """Save, prove that the file reloads, sample from it and write the card."""
        config, is_main = self.config, self.accelerator.is_main_process
        photos, joint_accelerator = self.batches.pools[0], self.joint_accelerator
        prompt = photos[0].wording.text(photos[0].caption, config.seed, 0)
        with averaged_weights(self):
            self.module.eval()
            with deepspeed.gathered_weights(self.module, self.accelerator):
                if is_main:
                    self.save(config.output_dir)
            expected = self.probe_output(prompt)
        if joint_accelerator:
            joint_accelerator.wait_for_everyone()
        # the trained model is freed before the file is loaded into a fresh one
        self.players.clear()
        del self.module
        self.accelerator.free_memory()
        self.family.unload()
        reloaded, encode, difference = proof.verify_export(config, self.encoder, expected, prompt)
        self.accelerator.print(f"reload proof: relative difference {difference:.1e}")
        if config.validation.prompts:
            folder = config.output_dir / SAMPLES / FINAL
            write_samples(reloaded, config, folder, encode, joint_accelerator)
        if is_main:
            model_card.write_dreambooth_card(config, steps, difference, photos, self.initial_lora)


def build(
    config: DreamBoothConfig, accelerator: Accelerator, shard: ShardFunction | None = None
) -> tuple[DreamBooth, DreamBoothBatches, Facts]:
    """Load in stages, and return the task, its batches and the facts of its pictures and base.

    Encoders and denoiser are never in memory together, unless the encoders train.
    """
    dtype = deepspeed.compute_dtype(accelerator) if config.lora else torch.float32
    family = open_family(config.model, accelerator.device, dtype, shard)
    batches, held_out = prepare_batches(family, config, accelerator)
    names = [family.denoiser_name]
    # validation decodes pictures, and without a cache each step encodes them
    if config.validation.draws_pictures or not config.data.cache:
        names.append("vae")
    family.load(*names, *batches.encoder.loaded_encoders)
    task = DreamBooth(family, batches, HeldOutLoss(held_out), config, accelerator)
    photos = task.held_out.pictures or batches.pools[0]
    task.likeness = make_likeness(family, config, batches.encoder.encoder_outputs, photos)
    base = family.digests(batches.encoder.cache.folder)
    held_out = describe_pools([task.held_out.pictures], (HELD_OUT,))
    facts = {"base": base, "pictures": describe_pools(batches.pools), HELD_OUT: held_out}
    if config.train.early_stop:
        # they decide where the run ends
        facts["pictures"] |= held_out
    return task, batches, facts | {INITIAL_LORA: task.initial_lora}
