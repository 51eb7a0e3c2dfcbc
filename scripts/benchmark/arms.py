"""What is measured: our script, and the peer's with several flags."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.sizes import PROMPT, RANK
from trainers.errors import UserError

RATE = 1e-4
# of the peer: the middle of its scripts' names, and the flags that are best
SCRIPTS = {"sd15": "lora", "sd3": "lora_sd3", "flux": "lora_flux"}
BEST_FLAGS = {
    "sd15": ["--pre_compute_text_embeddings"],
    "sd3": ["--cache_latents"],
    "flux": ["--cache_latents"],
}
ENCODES_EACH_STEP = """\
                    else:
                        prompt_embeds, pooled_prompt_embeds, text_ids = compute_text_embeddings(
                            prompts, text_encoders, tokenizers
                        )
"""
ENCODED_ONCE = """\
                    else:
                        prompt_embeds = instance_prompt_hidden_states.repeat(elems_to_repeat, 1, 1)
                        pooled_prompt_embeds = instance_pooled_prompt_embeds.repeat(
                            elems_to_repeat, 1
                        )
                        text_ids = instance_text_ids
"""


@dataclass
class Arm:
    name: str
    script: Path
    arguments: list[str]
    path: str = ""  # what PYTHONPATH begins with


def peer_arms(arguments: Namespace, family: str, settings: dict, temporary: Path) -> list[Arm]:
    """The peer's script by the flags of its README and by its best ones.

    For Flux also a copy that encodes the prompt once.
    """
    script = arguments.peer.resolve() / f"train_dreambooth_{SCRIPTS[family]}.py"
    flags = peer_flags(arguments, family, settings)
    readme = [f"--{name}={value}" for name, value in flags.items()] + ["--center_crop"]
    best = list(readme)
    # in half precision that flag crashes
    if family != "sd3" or arguments.precision == "no":
        best += BEST_FLAGS[family]
    if arguments.device == "cuda":
        best.append("--allow_tf32")
    best.append(f"--dataloader_num_workers={arguments.workers}")
    path = str(arguments.peer_path.resolve()) if arguments.peer_path else ""
    arms = [Arm("README flags", script, readme, path), Arm("best flags", script, best, path)]
    if family == "flux":
        copy = temporary / script.name
        copy.write_text(patch_flux_script(arguments.peer))
        arms.append(Arm("best flags, mended", copy, best, path))
    return arms


def peer_flags(arguments: Namespace, family: str, settings: dict) -> dict[str, Any]:
    """The same training as ours, in the peer's words."""
    model, data = settings["model"], settings["data"]
    flags = {
        "pretrained_model_name_or_path": model["pretrained_model_name_or_path"],
        "instance_data_dir": data["instance_data_dir"],
        "instance_prompt": PROMPT,
        "resolution": data["resolution"],
        "train_batch_size": arguments.batch,
        "max_train_steps": settings["train"]["max_train_steps"],
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 1e-2,
        "rank": RANK,
        "seed": 0,
        "mixed_precision": arguments.precision,
    }
    if family != "sd15":
        flags["max_sequence_length"] = model["max_sequence_length"]
    if family == "flux":
        flags |= {"lora_alpha": RANK, "guidance_scale": 1}
    return flags


def patch_flux_script(peer: Path) -> str:
    """The script for Flux, with the prompt encoded once. Raises: UserError for another version."""
    script = peer / "train_dreambooth_lora_flux.py"
    text = script.read_text()
    if text.count(ENCODES_EACH_STEP) != 1:
        missing = "where it encodes the prompt at each step was not found"
        raise UserError(f"{script} is not as expected: {missing}")
    return text.replace(ENCODES_EACH_STEP, ENCODED_ONCE)
