"""Which programs read the file of a LoRA, and how."""

from __future__ import annotations

from trainers.config import DreamBoothConfig
from trainers.config.lora_section import TITLES
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


def lora_readers(config: DreamBoothConfig) -> str:
    """Which file is for which program besides diffusers; empty where all weights were trained."""
    facts, lora = config.facts, config.lora
    if lora is None:
        return ""
    if lora.type != "lora":
        name, own = TITLES[lora.type], f"; {facts.readers}" if facts.readers else ""
        return (
            f"This is {name}, which `load_lora_weights` of diffusers does not read. ComfyUI: put "
            f"`{WEIGHT_NAME}` into `models/loras` and choose it in a *Load LoRA* node, strength "
            f"1{own}. PEFT: `python scripts/export.py RUN --format peft` writes the folder that "
            "the code above loads. As plain LoRA: `python scripts/export.py RUN --rank 16` writes "
            "the nearest of a rank."
        )
    if lora.use_dora:
        return (
            "diffusers and PEFT read this LoRA. ComfyUI, A1111 and Forge would leave out the "
            "magnitudes of DoRA, which changes the pictures: for them "
            "`python scripts/export.py RUN --format merged` writes a whole pipeline."
        )
    if facts.kohya.by_default and not config.writes_kohya:
        return (
            "ComfyUI, A1111 and Forge do not know the names in this file: for them "
            "`python scripts/export.py RUN --format kohya` writes another."
        )
    file = KOHYA_NAME if config.writes_kohya else WEIGHT_NAME
    others = f"; {facts.readers}" if facts.readers else ""
    return (
        f"ComfyUI: put `{file}` into `models/loras` and choose it in a *Load LoRA* node, strength "
        f"1{others}."
    )


def peft_parts(config: DreamBoothConfig) -> list[str]:
    """The parts of the pipeline that PEFT has to load, since diffusers does not."""
    if config.lora is None or config.lora.type == "lora":
        return []
    encoders = config.facts.text_encoders
    trained = [name for name, encoder in encoders.items() if encoder.lora]
    return [config.facts.kohya.denoiser, *(trained if config.train.train_text_encoder else ())]
