"""The part of a family that trains, as one module with its parameter groups."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from trainers.config import DreamBoothConfig
from trainers.config.base import OptimizerConfig
from trainers.distributed.trained_weights import trainable_parameters
from trainers.families.base import Family


class TrainableDenoiser(nn.Module):
    """The denoiser and the text encoders that train, as one callable.

    They are one module because DistributedDataParallel synchronizes only what it calls itself.
    """

    def __init__(self, family: Family, text_encoders: Sequence[str]) -> None:
        super().__init__()
        self.family = family
        self.denoiser = family.denoiser
        trained = {name: getattr(family.pipe, name) for name in text_encoders}
        self.text_encoders = nn.ModuleDict(trained)

    def forward(self, x_t: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """Predict from x_t (B, C, h, w) at times t (B,) what the objective regresses.

        text: the outputs of the frozen text encoders, {NAME_ids: (B, L)} of those that train, and
        the geometry of the pictures.
        """
        for name in self.text_encoders:
            text = text | self.family.encode_ids(name, text[f"{name}_ids"])
        return self.family.denoise(self.denoiser, x_t, t, text)

    def parameter_groups(self, config: OptimizerConfig) -> list[dict]:
        """The optimizer's groups with their peak learning rates, one for each part that trains.

        By LoRA+ (Hayou et al. 2024) it is two, of which one has the part's lora_B.
        """
        shared, own, ratio = config.learning_rate, config.text_encoder_lr, config.lora_plus_ratio
        rates = {self.denoiser: shared, self.text_encoders: shared if own is None else own}
        groups = []
        for part, rate in rates.items():
            slow, fast = [], []
            for name, parameter in trainable_parameters(part).items():
                is_fast = ratio is not None and ".lora_B." in name
                (fast if is_fast else slow).append(parameter)
            groups += [{"params": slow, "lr": rate}, {"params": fast, "lr": rate * (ratio or 1)}]
        return [group for group in groups if group["params"]]

    def freeze_unread_layers(self) -> None:
        """Train no layer of a text encoder whose output is not read.

        It would have no gradient, for which DistributedDataParallel waits.
        """
        for name, encoder in self.text_encoders.items():
            number = self.family.facts.text_encoders[name].unread_layers
            modules = dict(encoder.named_modules())
            layers = [key for key in modules if re.search(r"\bencoder\.layers\.\d+$", key)]
            ends = [key for key in modules if key.endswith("final_layer_norm")]
            for key in [*layers[-number:], *ends] if number else ():
                modules[key].requires_grad_(False)

    def exclude_from_ddp(self, names: Sequence[str]) -> None:
        """Keep DistributedDataParallel from broadcasting these parameters when it wraps this."""
        # PyTorch reads this attribute; it has no public way to say it
        self._ddp_params_and_buffers_to_ignore = names


def trained_encoders(family: Family, config: DreamBoothConfig) -> Sequence[str]:
    """The names of the text encoders that train: with LoRA, those that can have it."""
    if not config.train.train_text_encoder:
        return ()
    return family.clip_encoders if config.lora else family.text_encoder_names
