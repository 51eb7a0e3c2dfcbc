"""How good a finished LoRA is, what it costs the base, which checkpoint to keep and how much of its
rank is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from trainers.atomic import write_atomic
from trainers.config import DreamBoothConfig
from trainers.config.trigger import fill_given
from trainers.data.caption_variants import Wording
from trainers.data.folders import collect_image_files
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.pictures import Picture, picture_from_file
from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.files import read_lora
from trainers.lora.likeness import decode_square
from trainers.lora.low_rank import energy_by_rank, smallest_rank
from trainers.lora.sampler import LoraSampler, PromptSeeds, save_pictures
from trainers.metrics.feature_networks import FeatureNetwork
from trainers.metrics.lora_quality import (
    SUBJECT_LESS_DRIFT,
    MetricsRow,
    best_row,
    find_memorization,
    lora_metrics,
    subject_less_drift,
)
from trainers.run_folder import (
    EVALUATION,
    EVALUATION_NAME,
    FINAL,
    LORA_NAMES,
    WEIGHT_NAME,
    parse_step,
    step_name,
)
from trainers.training.best_weights import write_best
from trainers.training.run_weights import RunWeights


@dataclass(frozen=True)
class EvaluationOptions:
    """photos: a folder of held-out ones; prompts and class_prompts. None: the run's own.

    step: of the LoRA; None: the finished run's. is_best: it is the one in RUN/best. concept: which
    of several is measured; None: the first.
    """

    photos: Path | None = None
    prompts: Sequence[str] | None = None
    class_prompts: Sequence[str] | None = None
    checkpoints: bool = False
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    num_images: int = 8
    step: int | None = None
    is_best: bool = False
    concept: str | None = None


def evaluate(
    config: DreamBoothConfig,
    run: Path,
    networks: Sequence[FeatureNetwork],
    options: EvaluationOptions,
) -> dict:
    """What RUN/evaluation.json holds; pictures are in RUN/evaluation, the best LoRA in RUN/best.

    RUN/evaluation-step-NNNNNN has both of the LoRA of a step. networks: from `find_networks`.
    Raises: UserError where there is no LoRA.
    """
    check_evaluable(weights := RunWeights(run, config, options.step, is_best=options.is_best))
    config, concept = of_concept(config, options.concept)
    training, out = load_instance_pictures(config.data), evaluation_folder(weights)
    photo_folder = options.photos or config.data.sets[0].held_out_dir
    photos = load_held_out_photos(photo_folder, training) if photo_folder else training
    prompt_seeds, size = plan_samples(config, training, options), config.data.max_resolution
    prompts = {row: [prompt for prompt, _ in seeds] for row, seeds in prompt_seeds.items()}
    shutil.rmtree(out, ignore_errors=True)
    exported = out if options.checkpoints else None
    sampler = LoraSampler(weights, [*chain(*prompts.values())], exported)
    target, training_pixels = decode_square(photos, size), decode_square(training, size)
    save_pictures({"photo": training_pixels}, out / "photos")
    base = sampler("base", prompt_seeds, out / "base")
    measure = partial(lora_metrics, networks, base=base, photos=target, prompts=prompts)
    rows: list[MetricsRow] = [{"checkpoint": "base", "step": 0, **measure(base)}]
    for name in sampler.folders:
        step = config.train.max_train_steps if name == FINAL else parse_step(name)
        generated = sampler(name, prompt_seeds, out / name)
        rows.append({"checkpoint": name, "step": step, **measure(generated)})
    few = {row: seeds for row, seeds in prompt_seeds.items() if row in ("subject", "class")}
    strength = []
    for scale in options.strengths:
        row = measure(sampler(sampler.name, few, out / f"strength-{scale:.2f}", scale))
        strength.append({"scale": scale} | {name: row[name] for name in ("subject", "prior_drift")})
    result = {
        "net": networks[0].name,
        "prompt_net": prompt_network_name(networks),
        **concept,
        "photos": "held out" if photo_folder else "training",
        "columns": list(rows[0])[2:],
        "rows": rows,
        "strength": strength,
        "best": keep_best(run, rows[1:], sampler.folders) if options.checkpoints else None,
        **rank_usage(weights.folder, sampler.family),
        "memorisation": find_memorization(networks[0], generated, training_pixels),
    }
    file = (run if options.step is None else out) / EVALUATION_NAME
    write_atomic(file, json.dumps(result, indent=2) + "\n")
    return result


def of_concept(
    config: DreamBoothConfig, name: str | None
) -> tuple[DreamBoothConfig, dict[str, str]]:
    """The config with one of its concepts, and what the result says of it; all of a config without
    concepts. Raises: UserError for a name that none has."""
    data = config.data
    if data.concepts is None:
        if name is not None:
            raise UserError(f"the run has no data.concepts, so there is no concept {name!r}")
        return config, {}
    by_name = {photos.name: photos for photos in data.sets}
    chosen = next(iter(by_name)) if name is None else name
    if chosen not in by_name:
        raise UserError(f"{chosen!r} is none of the run's concepts: {', '.join(by_name)}")
    only = data.model_copy(update={"concepts": [by_name[chosen]]})
    others = ", ".join(other for other in by_name if other != chosen)
    note = f"{chosen} alone is measured; --concept measures {others}" if others else chosen
    return config.model_copy(update={"data": only}), {"concept": note}


def prompt_network_name(networks: Sequence[FeatureNetwork]) -> str | None:
    """The network that compares pictures with their prompts, if one can."""
    return next((network.name for network in networks if network.text_features), None)


def evaluation_folder(weights: RunWeights) -> Path:
    """Where the pictures go: of a step beside those of the finished run."""
    if weights.step is None:
        return weights.run / EVALUATION
    return weights.run / f"{EVALUATION}-{step_name(weights.step)}"


def check_evaluable(weights: RunWeights) -> None:
    """Raises: UserError where there is no LoRA, or none yet."""
    if weights.config.lora is None:
        raise UserError(
            f"{weights.run} trained all weights: only a LoRA can be compared with the base under it"
        )
    if not (weights.folder / WEIGHT_NAME).is_file():
        raise UserError(f"{weights.run} is not finished: it has no {WEIGHT_NAME}")


def keep_best(run: Path, rows: Sequence[MetricsRow], folders: dict[str, Path]) -> str:
    """Put the best checkpoint's LoRA in place of what is in RUN/best; its name is returned."""
    best = best_row(rows)
    name = best["checkpoint"]

    def copy(folder: Path) -> None:
        for file in LORA_NAMES:
            if (folders[name] / file).is_file():
                shutil.copyfile(folders[name] / file, folder / file)

    write_best(run, copy, best["step"], SUBJECT_LESS_DRIFT, subject_less_drift(best))
    return name


def rank_usage(folder: Path, family: Family) -> dict[str, int | dict[str, float]]:
    """How much of the LoRA each rank holds, and the smallest that would do; of DoRA without its
    magnitudes."""
    energies = energy_by_rank(read_lora(folder / WEIGHT_NAME, family))
    spectrum = {str(rank): share for rank, share in enumerate(energies, 1)}
    return {"suggested_rank": smallest_rank(energies), "spectrum": spectrum}


def load_held_out_photos(folder: Path, training: Sequence[Picture]) -> list[Picture]:
    """Raises: UserError for none, for a broken one, and for one that was trained on."""
    depth = training[0].bit_depth
    photos = [picture_from_file(path, bit_depth=depth) for path in collect_image_files([folder])]
    names = {picture.facts.fingerprint: picture.name for picture in training}
    if trained_on := next((photo for photo in photos if photo.facts.fingerprint in names), None):
        raise UserError(
            f"{trained_on.name} is not held out: it is the training photo "
            f"{names[trained_on.facts.fingerprint]}"
        )
    return photos


def plan_samples(
    config: DreamBoothConfig, training: Sequence[Picture], options: EvaluationOptions
) -> PromptSeeds:
    """Rows "subject", "class" and "prompt-K" of `num_images` each. Picture i starts from
    validation.seed + i, as the run's own samples, and several instance or class prompts take turns,
    as in training."""
    data, first, n = config.data, config.validation.seed, options.num_images
    wording = Wording.from_config(data, data.sets[0].trigger)
    subject = [wording.complete(prompt) for prompt in data.instance_prompts]
    others, class_prompts = config.validation.texts, data.class_prompts
    if options.prompts is not None:
        others = fill_given(options.prompts, data.sets[0].trigger)
    if options.class_prompts is not None:
        class_prompts = fill_given(options.class_prompts, data.sets[0].trigger)
    prompts_by_row = {
        "subject": subject or [picture.caption for picture in training],
        "class": class_prompts,
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
    labeled["compared with"] = f"the {result['photos']} photos by {result['net']}"
    return labeled | ({"concept": result["concept"]} if "concept" in result else {})


def format_evaluation(result: dict) -> str:
    """`evaluate`'s result for a terminal."""

    def line(name: str, row: MetricsRow, columns: Sequence[str]) -> str:
        return f"{name:14}" + "".join(
            f"{'-' if row[c] is None else format(row[c], '.3f'):>13}" for c in columns
        )

    columns, flagged = result["columns"], [row for row in result["memorisation"] if row["flagged"]]
    last = FINAL if result["rows"][-1]["checkpoint"] == FINAL else "step"
    lines = [f"{'':14}" + "".join(f"{name:>13}" for name in columns)]
    lines += [line(row["checkpoint"], row, columns) for row in result["rows"]]
    lines += [
        line(f"{last} x {row['scale']:.2f}", row, ("subject", "prior_drift"))
        for row in result["strength"]
    ]
    lines += ["", f"compared with the {result['photos']} photos by {result['net']}"]
    lines += [f"concept: {result['concept']}"] if "concept" in result else []
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
