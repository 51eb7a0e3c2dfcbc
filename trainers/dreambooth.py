"""DreamBooth on any family: LoRA or all weights, with prior preservation (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainers.config import DreamBoothConfig
from trainers.data.crops import view
from trainers.data.dreambooth_batches import Batches
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.pictures import class_pictures, held_out_pictures, instance_pictures
from trainers.data.rng import Draws, mix
from trainers.data.sampler import Share
from trainers.distributed import deepspeed
from trainers.distributed.fsdp import Shard, cut
from trainers.distributed.trained_weights import trained_parameters
from trainers.efficiency import apply, compilation
from trainers.families import FAMILIES, Family
from trainers.families.sampling import make_class_images, write_samples
from trainers.lora import export, proof
from trainers.publishing import model_card
from trainers.training.loop import Means, averaged, make_player

AHEAD = 32  # steps whose modulation is computed at once


DRAWS = 4  # of time and noise for each held-out photo


class Denoiser(nn.Module):
    """The denoiser, and the text encoders that train, as one callable: what DDP wraps is only ever called."""

    def __init__(self, family: Family, text_encoders: Sequence[str]) -> None:
        super().__init__()
        self.family = family
        self.denoiser = family.denoiser
        self.text_encoders = nn.ModuleDict({name: getattr(family.pipe, name) for name in text_encoders})

    def forward(self, x_t: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """text: each text encoder's outputs, or {NAME_ids: (B, L)} of those that train."""
        for name in self.text_encoders:
            text = text | self.family.encode_text(name, text[f"{name}_ids"])
        return self.family.denoise(self.denoiser, x_t, t, text)


class DreamBooth:
    """The task of the loop; see `losses` for its mathematics."""

    def __init__(
        self, family: Family, encoder: CachedEncoder, config: DreamBoothConfig, accelerator: Accelerator
    ) -> None:
        """The family holds its denoiser, and the text encoders if they train."""
        self.family, self.encoder, self.config, self.accelerator = family, encoder, config, accelerator
        self.objective = family.make_objective(config.objective, config.data.resolution)
        torch.manual_seed(mix(config.seed, "init"))
        self.module = Denoiser(family, encoder.train)
        if config.lora:
            family.add_lora(config.lora, encoder.train)
        else:
            self.module.requires_grad_(True)
        family.settle()
        compilation.checkpointed(family.denoiser, config.train.gradient_checkpointing)
        self.module._ddp_params_and_buffers_to_ignore = cut(self.module, accelerator)
        rate = config.optimizer.learning_rate
        text_rate = rate if config.optimizer.text_encoder_lr is None else config.optimizer.text_encoder_lr
        parts = [(self.module.denoiser, rate), (self.module.text_encoders, text_rate)]
        groups = [{"params": list(trained_parameters(part).values()), "lr": lr} for part, lr in parts]
        groups = [group for group in groups if group["params"]]
        player = make_player(self.module, groups, config.optimizer, config.train.ema_decay, accelerator)
        self.players, self.observers = {"denoiser": player}, [self.hold_out]
        self.batches: Batches
        self.held_out: Batches | None = None

    def losses(self, batch: dict, rng: Draws) -> Iterator[tuple[str, Tensor]]:
        """batch: moments (B, 2C, h, w), text {name: (B, ...)}, weight (B,), see `data.Batches`."""
        x0, eps, t = self.draw(batch, rng)
        x_t = self.objective.corrupt(x0, eps, t)
        if self.family.modulation and self.module.training:
            self.recall(rng)
        prediction = self.players["denoiser"].module(x_t, t, batch["text"])
        error = (prediction.float() - self.objective.target(x0, eps, t)).square().mean(dim=(1, 2, 3))  # (B,)
        yield "denoiser", (batch["weight"] * self.objective.weight(t) * error).sum()

    def draw(self, batch: dict, rng: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """x0 and eps (B, C, h, w), t (B,)."""
        x0 = self.family.latents(batch["moments"], rng)
        return x0, self.objective.noise(x0, rng), self.objective.times(rng)

    def recall(self, rng: Draws) -> None:
        """Bring what adaptive norms give for this micro-batch; computed for the next steps too, when it is lacking."""
        modulation, now = self.family.modulation, (rng.step, rng.rows[0])
        if now not in modulation.ahead:
            with self.accelerator.autocast():
                modulation.refill({key: modulation.embedding(self.module, *x) for key, x in self.coming(rng.step)})
        modulation.recall(now)

    def coming(self, first: int) -> Iterator[tuple[Hashable, tuple]]:
        """Key and the denoiser's inputs of this process's micro-batches in the steps from `first` on."""
        for step in range(first, first + AHEAD):
            for batch, rng in self.batches(step):
                x0, _, t = self.draw(batch, rng)
                yield (step, rng.rows[0]), (x0, t, batch["text"])

    @torch.no_grad()
    def hold_out(self, step: int, means: Means) -> None:
        """Adds the loss on the held-out photos, always by the same times and noise, with averaged weights if kept."""
        if self.held_out and step % self.config.validation.validation_steps == 0:
            self.module.eval()
            with averaged(self):
                losses = [loss for batch, rng in self.held_out(0) for _, loss in self.losses(batch, rng)]
            self.module.train()
            means["held_out_loss"] = torch.stack(losses).mean()

    @property
    def joint(self) -> bool:
        return self.family.shard is not None or deepspeed.stage(self.accelerator) == 3

    def sample(self, folder: Path) -> None:
        """Validation pictures by the weights as they are now; what does not train was encoded before the training."""
        if self.config.validation.prompts:
            self.module.eval()
            try:
                write_samples(self.family, self.config, folder, self.encoder.outputs, self.crew)
            finally:
                self.module.train()

    @property
    def crew(self) -> Accelerator | None:
        """Who works on one thing together, if not each process alone."""
        return self.accelerator if self.joint else None

    def save(self, folder: Path) -> None:
        """LoRA weights, or the whole pipeline when all weights train."""
        if self.config.lora:
            export.save_lora(self.family, self.encoder.train, folder, self.config)
        else:
            export.save_pipeline(self.family, self.encoder.train, folder / "pipeline")

    def probe(self, prompt: str) -> Tensor:
        text = self.encoder.text(prompt)
        plain = self.accelerator.unwrap_model(self.players["denoiser"].module, keep_fp32_wrapper=False)
        return proof.probe(self.family, self.config.data.resolution, text, plain)

    def finish(self) -> None:
        """Save, prove that the file reloads, sample from it, write the card. The trained model is freed on the way."""
        config, family, prompt = self.config, self.family, self.batches.pools[0][0].caption
        main, crew = self.accelerator.is_main_process, self.crew
        with averaged(self):
            self.module.eval()
            with deepspeed.whole(self.module, self.accelerator):
                if main:
                    self.save(config.output_dir)
            expected = self.probe(prompt)
        if crew:
            crew.wait_for_everyone()
        self.players.clear()
        del self.module
        self.accelerator.free_memory()
        family.release()
        fresh, encode, difference = proof.prove(config, self.encoder, expected, prompt)
        self.accelerator.print(f"reload proof: relative difference {difference:.1e}")
        if config.validation.prompts:
            write_samples(fresh, config, config.output_dir / "samples" / "final", encode, crew)
        if main:
            model_card.write_card(config, difference, [picture.digest for picture in self.batches.pools[0]])


def build(
    config: DreamBoothConfig, accelerator: Accelerator, shard: Shard | None = None
) -> tuple[DreamBooth, Batches, str]:
    """The task, its batches and a digest of its data, in stages: encoders and denoiser are never in memory together."""
    data, pools = config.data, [instance_pictures(config.data)]
    dtype = deepspeed.precision(accelerator) if config.lora else torch.float32
    family = FAMILIES[config.model.family](config.model, accelerator.device, dtype, shard)
    text = family.clip_encoders if config.lora else family.text_encoder_names
    text = text if config.train.train_text_encoder else ()
    encoder = CachedEncoder(family, data.cache_dir or config.output_dir / "cache", data.cache, text)
    if data.prior:
        folder = data.class_data_dir or config.output_dir / "class_images"
        make_class_images(encoder, config, folder, accelerator)
        pools.append(class_pictures(folder, data))
    held_out = held_out_pictures(data) if data.held_out_dir else []
    pictures = [*chain(*pools), *held_out]
    if data.cache:
        views = ((picture, view(picture, v, data)) for picture in pictures for v in range(data.variants))
        prompts = [picture.caption for picture in pictures] + config.validation.prompts
        encoder.fill(views, dict.fromkeys([*prompts, config.validation.negative_prompt, ""]), accelerator)
    names = [family.denoiser_name]
    names += ["vae"] if config.validation.prompts or not data.cache else []
    family.load(*names, *encoder.live)
    task = DreamBooth(family, encoder, config, accelerator)
    share = Share.of(config.seed, config.train, accelerator)
    task.batches = Batches(pools, encoder, data, share, accelerator.device)
    if held_out:
        every = Share(mix(config.seed, "held out"), 1, DRAWS * len(held_out))
        plain = data.model_copy(update={"caption_dropout": 0.0})
        task.held_out = Batches([held_out], encoder, plain, every, accelerator.device)
    apply.tune(task)
    digest = f"{mix(*(part for picture in pools[0] for part in (picture.digest, picture.caption))):x}"
    return task, task.batches, digest
