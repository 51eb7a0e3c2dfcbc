"""How good a finished LoRA is, what it costs the base, which checkpoint to keep and how much of its
rank is used."""

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
from trainers.data.crops import Crop
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import to_pil, write_grid
from trainers.data.pictures import Picture, collect_image_files, load_instance_pictures
from trainers.distributed.trained_weights import trainable_state
from trainers.dreambooth import Denoiser
from trainers.efficiency.apply import open_family
from trainers.errors import UserError
from trainers.families import Family
from trainers.families.sampling import sample_picture
from trainers.lora.export import save_lora
from trainers.lora.layers import add_lora
from trainers.lora.low_rank import energy_by_rank, smallest_rank
from trainers.lora.peft_format import from_peft
from trainers.lora.proof import check_keys
from trainers.metrics.feature_networks import FeatureNetwork
from trainers.metrics.lora_quality import MetricsRow, best_row, find_memorization, lora_metrics
from trainers.run_folder import WEIGHT_NAME, list_checkpoints
from trainers.training.checkpoint import read_checkpoint

PromptSeeds = dict[
    str, list[tuple[str, int]]
]  # rows of pictures, each by its prompt and the seed of its noise


@dataclass(frozen=True)
class EvaluationOptions:
    """photos: a folder of held-out ones; prompts and class_prompts. None: the run's own."""

    photos: Path | None = None
    prompts: Sequence[str] | None = None
    class_prompts: Sequence[str] | None = None
    checkpoints: bool = False
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    num_images: int = 8


class LoraSampler:
    """A run's base with its LoRAs, each loaded from its file by diffusers; the same seed is the
    same noise for all."""

    def __init__(
        self,
        config: DreamBoothConfig,
        run: Path,
        prompts: Sequence[str],
        export_folder: Path | None,
    ) -> None:
        """export_folder: a folder for the LoRA files of the checkpoints, if they are wanted too."""
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        half = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
        family = open_family(config.model, accelerator.device, half)
        text_encoders = family.clip_encoders if config.train.train_text_encoder else ()
        self.encoder = CachedEncoder(
            family, config.data.cache_dir or run / "cache", config.data.cache, text_encoders
        )
        if config.data.cache:
            self.encoder.fill(
                [], dict.fromkeys([*prompts, config.validation.negative_prompt]), accelerator
            )
        self.folders = {
            **(
                export_checkpoints(config, run, family, text_encoders, export_folder)
                if export_folder
                else {}
            ),
            "final": run,
        }
        family.load("vae", family.denoiser_name, *self.encoder.loaded_encoders)
        for name, folder in self.folders.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a base may hold several, says PEFT
                family.pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME, adapter_name=name)
            check_keys(family, (family.denoiser_name, *text_encoders), folder / WEIGHT_NAME)
        family.apply_memory_options()
        self.family, self.config = family, config

    def __call__(
        self, name: str, prompt_seeds: PromptSeeds, folder: Path, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Rows of pictures (N, 3, S, S) in [-1, 1], kept as folder/ROW-I.png; "base" is without a
        LoRA."""
        if name == "base":
            self.family.pipe.disable_lora()
        else:
            self.family.pipe.enable_lora()
            self.family.pipe.set_adapters(name, scale)
        validation, size, generated = self.config.validation, self.config.data.resolution, {}
        for prompt, seed in tqdm(
            dict.fromkeys(chain(*prompt_seeds.values())), folder.name, unit="picture", leave=False
        ):
            generated[prompt, seed] = Crop(size)(
                sample_picture(
                    self.family, prompt, validation, seed, size, self.encoder.encoder_outputs
                )
            )
        return save_pictures(
            {
                row: torch.stack([generated[prompt_seed] for prompt_seed in row_seeds])
                for row, row_seeds in prompt_seeds.items()
            },
            folder,
        )


@torch.no_grad()
def export_checkpoints(
    config: DreamBoothConfig,
    run: Path,
    family: Family,
    text_encoders: Sequence[str],
    export_folder: Path,
) -> dict[str, Path]:
    """Each checkpoint of the run as a LoRA file in a folder of its own, the oldest first; averaged
    weights if kept."""
    family.load(family.denoiser_name, *text_encoders)
    module = Denoiser(family, text_encoders)
    add_lora(family, config.lora, text_encoders)
    trained, folders = trainable_state(module), {}
    for checkpoint in reversed(list_checkpoints(run / "checkpoints")):
        if (state := read_checkpoint(checkpoint)) is None:
            warnings.warn(f"{checkpoint} is damaged and is passed over", stacklevel=2)
            continue
        for part in ("denoiser.safetensors", "denoiser.ema.safetensors"):
            for name, tensor in load(state[1][part]).items() if part in state[1] else ():
                trained[name].copy_(tensor)
        folders[checkpoint.name] = export_folder / checkpoint.name
        folders[checkpoint.name].mkdir(parents=True)
        save_lora(family, text_encoders, folders[checkpoint.name], config)
    family.unload()
    return folders


def evaluate(
    config: DreamBoothConfig,
    run: Path,
    networks: Sequence[FeatureNetwork],
    options: EvaluationOptions,
) -> dict:
    """What RUN/evaluation.json holds; its pictures lie in RUN/evaluation, the best checkpoint's
    LoRA in RUN/best.

    networks: as `features.nets_at_hand` gives them. Raises: UserError where there is no LoRA, and
    see `load_held_out_photos`.
    """
    if config.lora is None:
        raise UserError(
            f"{run} trained all weights: only a LoRA can be compared with the base under it"
        )
    if not (run / WEIGHT_NAME).is_file():
        raise UserError(f"{run} is not finished: it has no {WEIGHT_NAME}")
    training, out = load_instance_pictures(config.data), run / "evaluation"
    photo_folder = options.photos or config.data.held_out_dir
    photos = load_held_out_photos(photo_folder, training) if photo_folder else training
    prompt_seeds, size = plan_samples(config, training, options), config.data.resolution
    prompts = {row: [prompt for prompt, _ in row_seeds] for row, row_seeds in prompt_seeds.items()}
    shutil.rmtree(out, ignore_errors=True)
    sampler = LoraSampler(
        config, run, [*chain(*prompts.values())], out if options.checkpoints else None
    )
    target, training_pixels = (
        torch.stack([Crop(size)(photo.decode()) for photo in group]) for group in (photos, training)
    )
    save_pictures({"photo": training_pixels}, out / "photos")
    base = sampler("base", prompt_seeds, out / "base")
    rows: list[MetricsRow] = [
        {"checkpoint": "base", "step": 0, **lora_metrics(networks, base, base, target, prompts)}
    ]
    for name in sampler.folders:  # "final" is the last
        step = config.train.max_train_steps if name == "final" else int(name.removeprefix("step-"))
        generated = sampler(name, prompt_seeds, out / name)
        rows.append(
            {
                "checkpoint": name,
                "step": step,
                **lora_metrics(networks, generated, base, target, prompts),
            }
        )
    strength, strength_shots = (
        [],
        {row: row_seeds for row, row_seeds in prompt_seeds.items() if row in ("subject", "class")},
    )
    for scale in options.strengths:
        row = lora_metrics(
            networks,
            sampler("final", strength_shots, out / f"strength-{scale:.2f}", scale),
            base,
            target,
            prompts,
        )
        strength.append(
            {"scale": scale, "subject": row["subject"], "prior_drift": row["prior_drift"]}
        )
    if best_checkpoint := best_row(rows[1:])["checkpoint"] if options.checkpoints else None:
        (run / "best").mkdir(exist_ok=True)
        shutil.copyfile(sampler.folders[best_checkpoint] / WEIGHT_NAME, run / "best" / WEIGHT_NAME)
    plain = {
        name: value
        for name, value in load_file(run / WEIGHT_NAME).items()
        if "magnitude" not in name
    }
    energies = energy_by_rank(from_peft(plain, {}))
    result = {
        "net": networks[0].name,
        "prompt_net": next((network.name for network in networks if network.text_features), None),
        "photos": "held out" if photo_folder else "training",
        "columns": list(rows[0])[2:],
        "rows": rows,
        "strength": strength,
        "best": best_checkpoint,
        "suggested_rank": smallest_rank(energies),
        "spectrum": {str(rank): share for rank, share in enumerate(energies, 1)},
        "memorisation": find_memorization(networks[0], generated, training_pixels),
    }
    (run / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def save_pictures(rows: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write rows of pictures as ROW-I.png, and all of them as grid.png; they are returned."""
    images = {row: to_pil(x) for row, x in rows.items()}
    write_grid(list(images.items()), folder / "grid.png")
    for row, line in images.items():
        for i, image in enumerate(line):
            image.save(folder / f"{row}-{i:02d}.png")
    return rows


def load_held_out_photos(folder: Path, training: Sequence[Picture]) -> list[Picture]:
    """Raises: UserError for none, for a broken one, and for one that was trained on."""
    photos = [Picture(str(path), path.read_bytes, "") for path in collect_image_files([folder])]
    names_by_digest = {picture.digest: picture.name for picture in training}
    if trained_on := next((photo for photo in photos if photo.digest in names_by_digest), None):
        raise UserError(
            f"{trained_on.name} is not held out: it is the training photo "
            f"{names_by_digest[trained_on.digest]}"
        )
    return photos


def plan_samples(
    config: DreamBoothConfig, training: Sequence[Picture], options: EvaluationOptions
) -> PromptSeeds:
    """Rows "subject", "class" and "prompt-K" of `num_images` each. Picture i starts from
    validation.seed + i, as the run's own samples, and several instance or class prompts take turns,
    as in training."""
    data, first, n = config.data, config.validation.seed, options.num_images
    subject = (
        [data.instance_prompt]
        if data.instance_prompt
        else [picture.caption for picture in training]
    )
    others = config.validation.prompts if options.prompts is None else options.prompts
    prompts_by_row = {
        "subject": subject,
        "class": data.class_prompts if options.class_prompts is None else options.class_prompts,
    }
    prompts_by_row |= {
        f"prompt-{k}": [prompt]
        for k, prompt in enumerate(p for p in dict.fromkeys(others) if p not in subject)
    }
    return {
        row: [(prompts[i % len(prompts)], first + i) for i in range(n)]
        for row, prompts in prompts_by_row.items()
        if prompts
    }


def card_metrics(result: dict) -> dict[str, float | str]:
    """The final LoRA's figures for the card."""
    metrics = {name: result["rows"][-1][name] for name in result["columns"]}
    labeled = {
        name.replace("_", " "): value for name, value in metrics.items() if value is not None
    }
    return labeled | {"compared with": f"the {result['photos']} photos by {result['net']}"}


def format_evaluation(result: dict) -> str:
    """`evaluate`'s result for a terminal."""

    def line(name: str, row: MetricsRow, columns: Sequence[str]) -> str:
        return f"{name:14}" + "".join(
            f"{'-' if row[c] is None else format(row[c], '.3f'):>13}" for c in columns
        )

    columns, flagged = result["columns"], [row for row in result["memorisation"] if row["flagged"]]
    lines = [f"{'':14}" + "".join(f"{name:>13}" for name in columns)]
    lines += [line(row["checkpoint"], row, columns) for row in result["rows"]]
    lines += [
        line(f"final x {row['scale']:.2f}", row, ("subject", "prior_drift"))
        for row in result["strength"]
    ]
    lines += ["", f"compared with the {result['photos']} photos by {result['net']}"]
    lines += [
        f"compared with the prompts by {result['prompt_net'] or 'nothing: CLIP is not at hand'}"
    ]
    lines += [
        f"near-copies of a training photo: {len(flagged)} of {len(result['memorisation'])} samples"
    ]
    lines += [f"  {row['sample']} of {row['photo']} ({row['similarity']:.3f})" for row in flagged]
    energy = result["spectrum"][str(result["suggested_rank"])]
    lines += [
        f"rank {result['suggested_rank']} of {len(result['spectrum'])} keeps {energy:.1%} of the "
        f"update"
    ]
    return "\n".join(lines + ([f"best: {result['best']}, in best/"] if result["best"] else []))
