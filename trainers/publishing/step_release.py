"""The LoRA of a step in a folder like that of a finished run, to be pushed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from trainers.atomic import write_atomic
from trainers.config import DreamBoothConfig
from trainers.config.loading import dump_config
from trainers.publishing.model_card import write_dreambooth_card
from trainers.run_folder import CONFIG_NAME, FINAL, LORA_NAMES, SAMPLES, step_name
from trainers.training.run_weights import RunWeights


@contextmanager
def step_release(weights: RunWeights) -> Iterator[DreamBoothConfig]:
    """The config of such a folder, its `output_dir`, in which are the LoRA, the samples and a card.

    The card says nothing of a proof and of the pictures: they are no longer at hand.
    """
    with TemporaryDirectory() as parent:
        folder = Path(parent) / weights.run.resolve().name
        folder.mkdir()
        for name in LORA_NAMES:
            if (weights.folder / name).is_file():
                shutil.copyfile(weights.folder / name, folder / name)
        config = weights.config.model_copy(update={"output_dir": folder})
        samples = weights.run / SAMPLES / step_name(weights.step)
        if samples.is_dir():
            shutil.copytree(samples, folder / SAMPLES / FINAL)
        else:
            # a card without samples shows none
            validation = config.validation.model_copy(update={"prompts": []})
            config = config.model_copy(update={"validation": validation})
        write_atomic(folder / CONFIG_NAME, dump_config(config))
        write_dreambooth_card(config, weights.step, None, [])
        yield config
