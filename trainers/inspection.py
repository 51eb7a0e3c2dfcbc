"""The photos of a DreamBooth run before it trains: what is wrong with them, all at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from trainers.class_pictures import class_folder, is_drawn
from trainers.config import ConceptConfig, DataConfig, DreamBoothConfig, ModelConfig
from trainers.config.dreambooth_rules import is_single_file
from trainers.data.buckets import BucketRule, name_size
from trainers.data.file_outcomes import describe_files
from trainers.data.inspection import Inspection, PhotoReport, Sight
from trainers.data.intake import Intake
from trainers.data.photo_checks import check_photos, check_settings, check_texts
from trainers.data.photo_sets import (
    load_class_pictures,
    load_held_out_pictures,
    load_instance_pictures,
)
from trainers.data.pictures import Picture, list_image_files
from trainers.families import FAMILIES, Family
from trainers.original.convert import settings_folder

LEARNT, HELD_OUT, OF_CLASS = "learnt", "held out", "of the class"
# of a base model, what it takes to count tokens and to know its longest side
TOKENIZER_FILES = ["model_index.json", "tokenizer*/*", "scheduler/*", "*/config.json"]


def inspect_photos(config: DreamBoothConfig) -> Inspection:
    """Everything about the photos of a run in one process; no error ends it, all are noted."""
    data, intake = config.data, Intake(keeps_going=True)
    with warnings.catch_warnings():
        # pictures that are skipped stand in the list of files
        warnings.simplefilter("ignore")
        pools = {
            LEARNT: intake.attempt(lambda: load_instance_pictures(data, intake), []),
            HELD_OUT: intake.attempt(lambda: load_held_out_pictures(data, intake), []),
            OF_CLASS: intake.attempt(lambda: load_own_class_pictures(config, intake), []),
        }
    # what an error is about would not be learnt
    for name, pool in pools.items():
        pools[name] = [picture for picture in pool if picture.name not in intake.left_out]
    tokenizers = open_tokenizers(config.model, intake)
    rule = BucketRule.from_config(config, tokenizers.max_side if tokenizers else None)
    for name, pool in pools.items():
        pools[name] = [picture for picture in pool if has_size(picture, rule, intake)]
    if pools[LEARNT]:
        check_photos(intake, pools[LEARNT], pools[HELD_OUT], rule)
        check_settings(intake, pools[LEARNT], config, rule, num_processes=1)
    if tokenizers:
        check_texts(intake, tokenizers, [*pools[LEARNT], *pools[HELD_OUT]], config)
    rows = config.train.train_batch_size * config.train.gradient_accumulation_steps
    visits = {LEARNT: rows * config.train.max_train_steps, HELD_OUT: 0}
    # those that are yet to be drawn are seen as often as the others
    share = len(pools[OF_CLASS]) / max(count_class_pictures(data), 1)
    visits[OF_CLASS] = visits[LEARNT] * share
    sight = Sight(data, rule, tokenizers)
    photos = {name: sight.describe(pool, pool, visits[name]) for name, pool in pools.items()}
    files = describe_files(intake, describe_uses(photos))
    return Inspection(intake, photos, files, count_totals(config, photos))


def count_class_pictures(data: DataConfig) -> int:
    return sum(photos.num_class_images for photos, _ in data.class_sets)


def load_own_class_pictures(config: DreamBoothConfig, intake: Intake) -> list[Picture]:
    """The user's own of each class; the base draws the others when the run starts."""
    pictures = []
    for photos, _ in config.data.class_sets:
        pictures += load_own_of_class(photos, config, intake)
    return pictures


def load_own_of_class(
    photos: ConceptConfig, config: DreamBoothConfig, intake: Intake
) -> list[Picture]:
    folder = class_folder(photos, config)
    paths = list_image_files(folder)
    own = [path.name for path in paths if not is_drawn(path)][: photos.num_class_images]
    if missing := photos.num_class_images - len(own):
        text = f"class pictures: the base draws {missing} when the run starts"
        drawn = sum(map(is_drawn, paths))
        before = f", unless they are among the {drawn} that it has drawn before" if drawn else ""
        with intake.about(photos.name):
            intake.note(text + before)
    return load_class_pictures(folder, photos, config.data, set(own), intake) if own else []


def has_size(picture: Picture, rule: BucketRule, intake: Intake) -> bool:
    """Whether there is a size that a picture can be trained at; a note where there is not."""
    return bool(intake.attempt(lambda: rule.sizes(picture), [], [picture.name]))


def open_tokenizers(model: ModelConfig, intake: Intake) -> Family | None:
    """The family of the base with its tokenizers alone; None, and a note, where they are not at
    hand."""
    name = model.pretrained_model_name_or_path
    try:
        folder = name
        if is_single_file(name):
            folder = settings_folder(model)
        elif not Path(name).is_dir():
            folder = snapshot_download(
                name, revision=model.revision, allow_patterns=TOKENIZER_FILES
            )
        update = {"pretrained_model_name_or_path": str(folder), "revision": None}
        family = FAMILIES[model.family](model.model_copy(update=update))
        family.load()
        family.max_side  # noqa: B018 (it reads a file of the denoiser too)
    except Exception as error:  # of the Hub, of the network, of a tokenizer's files
        reason = (str(error).strip() or type(error).__name__).partition(". ")[0]
        intake.note(
            f"tokens are not counted: the tokenizers of {name} are not at hand "
            f"({' '.join(reason.split())})"
        )
        return None
    return family


def describe_uses(photos: dict[str, list[PhotoReport]]) -> dict[str, str]:
    """What each picture is used for, by its name."""
    uses = {}
    for pool, reports in photos.items():
        for report in reports:
            times = f", seen {report.visits:.3g} times" if report.visits else ""
            uses[report.picture.name] = f"{pool}{times}"
    return uses


def count_totals(
    config: DreamBoothConfig, photos: dict[str, list[PhotoReport]]
) -> dict[str, str | int | float]:
    learnt, train = photos[LEARNT], config.train
    rows = train.train_batch_size * train.gradient_accumulation_steps
    totals: dict[str, str | int | float] = {
        "photos to learn": len(learnt),
        "of them with remarks": sum(bool(report.remarks) for report in learnt),
        "steps": train.max_train_steps,
        "photos per step, in one process": rows,
        "times each is seen": name_range([report.visits for report in learnt]),
        "trained at": name_sizes(learnt),
    }
    if photos[HELD_OUT]:
        totals["held out"] = len(photos[HELD_OUT])
    if config.data.class_sets:
        own, number = len(photos[OF_CLASS]), count_class_pictures(config.data)
        totals["class pictures"] = f"{number}, {own} of your own"
    return totals


def name_range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def name_sizes(reports: Sequence[PhotoReport]) -> str:
    """The size that photos are trained at, or how many there are."""
    sizes = {view.size for report in reports for view in report.views}
    if len(sizes) == 1:
        return name_size(sizes.pop())
    return f"{len(sizes)} sizes"
