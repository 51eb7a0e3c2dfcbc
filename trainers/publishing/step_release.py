"""The weights of a step in a folder like that of a finished run, to be pushed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from trainers.atomic import write_atomic
from trainers.config import Config, DreamBoothConfig
from trainers.config.loading import dump_config
from trainers.errors import UserError
from trainers.publishing.best import best_facts
from trainers.publishing.markdown import markdown_table
from trainers.publishing.model_card import write_dreambooth_card
from trainers.run_folder import (
    BEST_NAME,
    CARD_NAME,
    CONFIG_NAME,
    FINAL,
    LORA_NAMES,
    MODEL,
    PIPELINE,
    SAMPLES,
    continue_hint,
    step_name,
)
from trainers.training.run_weights import RunWeights

# in the card of a small network: what is said of the last weights alone
LAST_FIGURES = re.compile(r"^\| (?:Held out: |Best \|).*\n", re.MULTILINE)
STEPS_ROW = re.compile(r"^(\| Steps \| )\d+", re.MULTILINE)
SAMPLES_LINE = re.compile(r"^!\[samples\].*\n\n", re.MULTILINE)


@contextmanager
def step_release(weights: RunWeights) -> Iterator[Config]:
    """The config of such a folder, its `output_dir`, in which are the weights, the samples and a
    card.

    The card says nothing of a proof, of figures and of photos: they are of the last weights, or no
    longer at hand.
    """
    with TemporaryDirectory() as parent:
        folder = Path(parent) / weights.run.resolve().name
        folder.mkdir()
        for name in (*LORA_NAMES, BEST_NAME):
            if (weights.folder / name).is_file():
                shutil.copyfile(weights.folder / name, folder / name)
        for name in (MODEL, PIPELINE):
            if (weights.folder / name).is_dir():
                shutil.copytree(weights.folder / name, folder / name)
        samples = weights.run / SAMPLES / step_name(weights.step)
        if samples.is_dir():
            shutil.copytree(samples, folder / SAMPLES / FINAL)
        config = weights.config.model_copy(update={"output_dir": folder})
        if isinstance(config, DreamBoothConfig):
            config = write_dreambooth_release(config, weights.step)
        else:
            write_scratch_card(weights, folder)
        write_atomic(folder / CONFIG_NAME, dump_config(config))
        yield config


def write_dreambooth_release(config: DreamBoothConfig, step: int) -> DreamBoothConfig:
    """Write the card; returns the config without samples where there are none."""
    if not (config.output_dir / SAMPLES / FINAL).is_dir():
        validation = config.validation.model_copy(update={"prompts": []})
        config = config.model_copy(update={"validation": validation})
    write_dreambooth_card(config, step, None, [])
    return config


def write_scratch_card(weights: RunWeights, folder: Path) -> None:
    """Write the run's own card with the step of these weights, and without the last ones'
    figures. Raises: UserError for a run that was stopped, which has no card yet."""
    card = weights.run / CARD_NAME
    if not card.is_file():
        raise UserError(
            f"{weights.run} is not finished: it has no {CARD_NAME}, of which {weights.name} takes "
            f"its own. {continue_hint(weights.run)}"
        )
    text = LAST_FIGURES.sub("", card.read_text("utf-8"))
    chosen = markdown_table(best_facts(folder)).splitlines()[-1]
    text = STEPS_ROW.sub(rf"{chosen}\n\g<1>{weights.step}", text)
    if not (folder / SAMPLES / FINAL).is_dir():
        text = SAMPLES_LINE.sub("", text)
    write_atomic(folder / CARD_NAME, text)
