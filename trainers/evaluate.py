"""How good a finished LoRA is, what it costs the base, which checkpoint to keep and how much of its rank is used."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load, load_file
from torch import Tensor
from tqdm.auto import tqdm

from trainers.config import DreamBoothConfig
from trainers.data.crops import View
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import pictures, write_grid
from trainers.data.pictures import Picture, files, instance_pictures
from trainers.distributed.trained_weights import trained_state
from trainers.dreambooth import Denoiser
from trainers.errors import UserError
from trainers.families import FAMILIES, Family
from trainers.lora.export import save_lora
from trainers.lora.low_rank import energy, smallest_rank
from trainers.lora.peft_format import from_peft
from trainers.lora.proof import check_keys
from trainers.metrics.feature_networks import Net
from trainers.metrics.lora_quality import Row, best, measure, memorisation
from trainers.run_folder import WEIGHT_NAME, checkpoints
from trainers.training.checkpoint import verified

Shots = dict[str, list[tuple[str, int]]]  # rows of pictures, each by its prompt and the seed of its noise


@dataclass(frozen=True)
class Wishes:
    """photos: a folder of held-out ones; prompts and class_prompts. None: the run's own."""

    photos: Path | None = None
    prompts: Sequence[str] | None = None
    class_prompts: Sequence[str] | None = None
    checkpoints: bool = False
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    num_images: int = 8


class Sampler:
    """A run's base with its LoRAs, each loaded from its file by diffusers; the same seed is the same noise for all."""

    def __init__(self, config: DreamBoothConfig, run: Path, prompts: Sequence[str], aside: Path | None) -> None:
        """aside: a folder for the LoRA files of the checkpoints, if they are wanted too."""
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        half = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
        family = FAMILIES[config.model.family](config.model, accelerator.device, half)
        text = family.clip_encoders if config.train.train_text_encoder else ()
        self.encoder = CachedEncoder(family, config.data.cache_dir or run / "cache", config.data.cache, text)
        if config.data.cache:
            self.encoder.fill([], dict.fromkeys([*prompts, config.validation.negative_prompt]), accelerator)
        self.folders = {**(export_checkpoints(config, run, family, text, aside) if aside else {}), "final": run}
        family.load("vae", family.denoiser_name, *self.encoder.live)
        for name, folder in self.folders.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a base may hold several, says PEFT
                family.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME, adapter_name=name)
            check_keys(family, (family.denoiser_name, *text), folder / WEIGHT_NAME)
        family.settle()
        self.family, self.config = family, config

    def __call__(self, name: str, shots: Shots, folder: Path, scale: float = 1.0) -> dict[str, Tensor]:
        """Rows of pictures (N, 3, S, S) in [-1, 1], kept as folder/ROW-I.png; "base" is without a LoRA."""
        if name == "base":
            self.family.pipe.disable_lora()
        else:
            self.family.pipe.enable_lora()
            self.family.pipe.set_adapters(name, scale)
        validation, size, made = self.config.validation, self.config.data.resolution, {}
        for prompt, seed in tqdm(dict.fromkeys(chain(*shots.values())), folder.name, unit="picture", leave=False):
            made[prompt, seed] = View(size)(self.family.sample(prompt, validation, seed, size, self.encoder.outputs))
        return keep({row: torch.stack([made[shot] for shot in wanted]) for row, wanted in shots.items()}, folder)


@torch.no_grad()
def export_checkpoints(
    config: DreamBoothConfig, run: Path, family: Family, text: Sequence[str], aside: Path
) -> dict[str, Path]:
    """Each checkpoint of the run as a LoRA file in a folder of its own, the oldest first; averaged weights if kept."""
    family.load(family.denoiser_name, *text)
    module = Denoiser(family, text)
    family.add_lora(config.lora, text)
    trained, folders = trained_state(module), {}
    for checkpoint in reversed(checkpoints(run / "checkpoints")):
        if (state := verified(checkpoint)) is None:
            warnings.warn(f"{checkpoint} is damaged and is passed over", stacklevel=2)
            continue
        for part in ("denoiser.safetensors", "denoiser.ema.safetensors"):
            for name, tensor in load(state[1][part]).items() if part in state[1] else ():
                trained[name].copy_(tensor)
        folders[checkpoint.name] = aside / checkpoint.name
        folders[checkpoint.name].mkdir(parents=True)
        save_lora(family, text, folders[checkpoint.name], config)
    family.release()
    return folders


def evaluate(config: DreamBoothConfig, run: Path, nets: Sequence[Net], wishes: Wishes) -> dict:
    """What RUN/evaluation.json holds; its pictures lie in RUN/evaluation, the best checkpoint's LoRA in RUN/best.

    nets: as `features.nets_at_hand` gives them. Raises: UserError where there is no LoRA, and see `held_out`.
    """
    if config.lora is None:
        raise UserError(f"{run} trained all weights: only a LoRA can be compared with the base under it")
    if not (run / WEIGHT_NAME).is_file():
        raise UserError(f"{run} is not finished: it has no {WEIGHT_NAME}")
    training, out = instance_pictures(config.data), run / "evaluation"
    others = wishes.photos or config.data.held_out_dir
    photos = held_out(others, training) if others else training
    shots, size = plan(config, training, wishes), config.data.resolution
    prompts = {row: [prompt for prompt, _ in wanted] for row, wanted in shots.items()}
    shutil.rmtree(out, ignore_errors=True)
    sampler = Sampler(config, run, [*chain(*prompts.values())], out if wishes.checkpoints else None)
    goal, learnt = (torch.stack([View(size)(photo.decode()) for photo in some]) for some in (photos, training))
    keep({"photo": learnt}, out / "photos")
    base = sampler("base", shots, out / "base")
    rows: list[Row] = [{"checkpoint": "base", "step": 0, **measure(nets, base, base, goal, prompts)}]
    for name in sampler.folders:  # "final" is the last
        step = config.train.max_train_steps if name == "final" else int(name.removeprefix("step-"))
        made = sampler(name, shots, out / name)
        rows.append({"checkpoint": name, "step": step, **measure(nets, made, base, goal, prompts)})
    strength, few = [], {row: wanted for row, wanted in shots.items() if row in ("subject", "class")}
    for scale in wishes.strengths:
        row = measure(nets, sampler("final", few, out / f"strength-{scale:.2f}", scale), base, goal, prompts)
        strength.append({"scale": scale, "subject": row["subject"], "prior_drift": row["prior_drift"]})
    if chosen := best(rows[1:])["checkpoint"] if wishes.checkpoints else None:
        (run / "best").mkdir(exist_ok=True)
        shutil.copyfile(sampler.folders[chosen] / WEIGHT_NAME, run / "best" / WEIGHT_NAME)
    plain = {name: value for name, value in load_file(run / WEIGHT_NAME).items() if "magnitude" not in name}
    kept = energy(from_peft(plain, {}))
    result = {
        "net": nets[0].name,
        "prompt_net": next((net.name for net in nets if net.read), None),
        "photos": "held out" if others else "training",
        "columns": list(rows[0])[2:],
        "rows": rows,
        "strength": strength,
        "best": chosen,
        "suggested_rank": smallest_rank(kept),
        "spectrum": {str(rank): share for rank, share in enumerate(kept, 1)},
        "memorisation": memorisation(nets[0], made, learnt),
    }
    (run / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def keep(rows: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write rows of pictures as ROW-I.png, and all of them as grid.png; they are returned."""
    images = {row: pictures(x) for row, x in rows.items()}
    write_grid(list(images.items()), folder / "grid.png")
    for row, line in images.items():
        for i, image in enumerate(line):
            image.save(folder / f"{row}-{i:02d}.png")
    return rows


def held_out(folder: Path, training: Sequence[Picture]) -> list[Picture]:
    """Raises: UserError for none, for a broken one, and for one that was trained on."""
    photos = [Picture(str(path), path.read_bytes, "") for path in files([folder])]
    known = {picture.digest: picture.name for picture in training}
    if same := next((photo for photo in photos if photo.digest in known), None):
        raise UserError(f"{same.name} is not held out: it is the training photo {known[same.digest]}")
    return photos


def plan(config: DreamBoothConfig, training: Sequence[Picture], wishes: Wishes) -> Shots:
    """Rows "subject", "class" and "prompt-K" of `num_images` each. Picture i starts from validation.seed + i, as the
    run's own samples, and several instance or class prompts take turns, as in training."""
    data, first, n = config.data, config.validation.seed, wishes.num_images
    subject = [data.instance_prompt] if data.instance_prompt else [picture.caption for picture in training]
    others = config.validation.prompts if wishes.prompts is None else wishes.prompts
    turns = {"subject": subject, "class": data.class_prompts if wishes.class_prompts is None else wishes.class_prompts}
    turns |= {f"prompt-{k}": [prompt] for k, prompt in enumerate(p for p in dict.fromkeys(others) if p not in subject)}
    return {row: [(words[i % len(words)], first + i) for i in range(n)] for row, words in turns.items() if words}


def headline(result: dict) -> dict[str, float | str]:
    """The final LoRA's figures for the card."""
    figures = {name: result["rows"][-1][name] for name in result["columns"]}
    told = {name.replace("_", " "): value for name, value in figures.items() if value is not None}
    return told | {"compared with": f"the {result['photos']} photos by {result['net']}"}


def table(result: dict) -> str:
    """`evaluate`'s result for a terminal."""

    def line(name: str, row: Row, columns: Sequence[str]) -> str:
        return f"{name:14}" + "".join(f"{'-' if row[c] is None else format(row[c], '.3f'):>13}" for c in columns)

    columns, flagged = result["columns"], [row for row in result["memorisation"] if row["flagged"]]
    lines = [f"{'':14}" + "".join(f"{name:>13}" for name in columns)]
    lines += [line(row["checkpoint"], row, columns) for row in result["rows"]]
    lines += [line(f"final x {row['scale']:.2f}", row, ("subject", "prior_drift")) for row in result["strength"]]
    lines += ["", f"compared with the {result['photos']} photos by {result['net']}"]
    lines += [f"compared with the prompts by {result['prompt_net'] or 'nothing: CLIP is not at hand'}"]
    lines += [f"near-copies of a training photo: {len(flagged)} of {len(result['memorisation'])} samples"]
    lines += [f"  {row['sample']} of {row['photo']} ({row['similarity']:.3f})" for row in flagged]
    kept = result["spectrum"][str(result["suggested_rank"])]
    lines += [f"rank {result['suggested_rank']} of {len(result['spectrum'])} keeps {kept:.1%} of the update"]
    return "\n".join(lines + ([f"best: {result['best']}, in best/"] if result["best"] else []))
