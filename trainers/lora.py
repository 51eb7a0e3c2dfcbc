"""LoRA layers through PEFT."""

from __future__ import annotations

from difflib import get_close_matches

from peft import LoraConfig as PeftConfig
from torch import nn

from . import UserError
from .config import LoraConfig

PEFT_INIT = {"gaussian": "gaussian", "kaiming": True, "orthogonal": "orthogonal"}


def add_adapter(module: nn.Module, config: LoraConfig, targets: str | list[str]) -> None:
    """Put LoRA layers into `module` and freeze the rest; they are float32 whatever the base's precision.

    targets: endings of module names, or one regex. Raises: UserError with the names that exist when none matches.
    """
    peft = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        lora_dropout=config.dropout,
        target_modules=targets,
        init_lora_weights=PEFT_INIT[config.init_lora_weights],
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    try:
        module.add_adapter(peft)
    except ValueError as error:
        endings = sorted({name.rpartition(".")[2] for name, m in module.named_modules() if isinstance(m, nn.Linear)})
        asked = targets if isinstance(targets, list) else [targets]
        close = [match for target in asked for match in get_close_matches(target, endings, 2)] or endings
        raise UserError(f"lora.target_modules: {error} Names that exist here: {', '.join(close[:12])}") from None
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
