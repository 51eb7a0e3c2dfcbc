"""What a LoRA in training has learned so far, read by the judge without writing it to a file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.dreambooth import DreamBooth
from trainers.training.loop import averaged_weights

from .gate import LEVELS
from .judge import load_judge
from .measure import (
    NUM_HELD_OUT,
    agreement,
    class_metrics,
    held_out_loss,
    load_pipeline,
    make_prompts,
    sample,
    subject_metrics,
)
from .world import (
    BACKGROUNDS,
    CLASSES,
    HELD_OUT_SEED,
    pick,
    plain_thing,
    subject,
    subject_images,
)

NUM_SAMPLES = 24
IN_A_ROW = 3  # probes that must pass for a run to be good
Metrics = dict[str, float]


def passes(metrics: Mapping[str, float], limits: Mapping[str, tuple[float, float]]) -> bool:
    """Whether all that has limits was measured and lies within them."""
    return all(
        name in metrics and low <= metrics[name] <= high for name, (low, high) in limits.items()
    )


class Streaks:
    """Since when a run has passed each level of the gate without a break."""

    def __init__(self) -> None:
        self.since: dict[str, dict[str, float]] = {}
        self.lengths = dict.fromkeys(LEVELS, 0)

    def add(self, metrics: Mapping[str, float], when: dict[str, float]) -> None:
        """The next probe; when: what is kept of the first one of a streak, such as its step."""
        for name, limits in LEVELS.items():
            if self.is_good(name):
                continue
            if passes(metrics, limits):
                self.since.setdefault(name, when)
                self.lengths[name] += 1
            else:
                self.since.pop(name, None)
                self.lengths[name] = 0

    def is_good(self, name: str) -> bool:
        return self.lengths[name] >= IN_A_ROW

    @property
    def good(self) -> dict[str, dict[str, float]]:
        """When the levels were passed that `IN_A_ROW` probes have confirmed."""
        return {name: when for name, when in self.since.items() if self.is_good(name)}


class Prober:
    """Measures the weights of a task beside the base that it started from.

    What costs little comes first, and what comes after a failed line of the gate is left out.
    """

    def __init__(self, config: DreamBoothConfig) -> None:
        self.config, self.judge = config, load_judge()
        self.pipeline = load_pipeline(config, lora=False)
        rng, shapes = np.random.default_rng(0), [name for name in CLASSES if name != "star"]
        things = [replace(plain_thing(rng), shape=pick(shapes, rng)) for _ in range(NUM_SAMPLES)]
        self.others = things
        places = [*BACKGROUNDS]
        edits = [subject(places[i % len(places)]) for i in range(NUM_SAMPLES)]
        self.prompts = make_prompts(edits, things)
        self.held_out = self.judge.read(subject_images(NUM_HELD_OUT, HELD_OUT_SEED))[1]
        self.base: dict[str, Tensor] = {}
        self.base = self.measure_all()

    @torch.no_grad()
    def __call__(self, task: DreamBooth) -> Metrics:
        """The metrics of `measure_samples` but the edits, up to the first that fails."""
        metrics: Metrics = {}
        task.module.eval()
        with averaged_weights(task), self.weights_of(task):
            for measure in self.stages():
                found, _ = measure()
                metrics |= found
                limits = LEVELS["whole"]
                if not passes(found, {name: limits[name] for name in found if name in limits}):
                    break
        task.module.train()
        return metrics

    @torch.no_grad()
    def measure_all(self) -> dict[str, Tensor]:
        """What is compared with: the loss, and the mean features of two rows."""
        found = {}
        for measure in self.stages():
            found |= measure()[1]
        return found

    def stages(self) -> list[Callable[[], tuple[Metrics, dict[str, Tensor]]]]:
        return [self.measure_loss, self.measure_subject, self.measure_class, self.measure_others]

    @contextmanager
    def weights_of(self, task: DreamBooth) -> Iterator[DiffusionPipeline]:
        """The pipeline with what a task trains in the places of the base's parts."""
        names = [task.family.denoiser_name, *task.encoder.trained_encoders]
        own = {name: getattr(self.pipeline, name) for name in names}
        self.pipeline.register_modules(**{name: getattr(task.family.pipe, name) for name in names})
        try:
            yield self.pipeline
        finally:
            self.pipeline.register_modules(**own)

    def read(self, row: str) -> tuple[dict[str, Tensor], Tensor]:
        first = 1000 * [*self.prompts].index(row)
        pictures = sample(self.pipeline, self.config, self.prompts[row], first)
        return self.judge.read(pictures)

    def measure_loss(self) -> tuple[Metrics, dict[str, Tensor]]:
        loss = held_out_loss(self.pipeline, self.config)
        return {"loss_ratio": loss / self.base.get("loss", loss)}, {"loss": loss}

    def measure_subject(self) -> tuple[Metrics, dict[str, Tensor]]:
        labels, features = self.read("subject")
        cosine = float((features @ self.held_out.T).mean())
        gain = cosine - self.base.get("cosine", cosine)
        return {**subject_metrics(labels), "cosine_gain": gain}, {"cosine": cosine}

    def measure_class(self) -> tuple[Metrics, dict[str, Tensor]]:
        labels, features = self.read("class")
        mean = features.mean(0)
        drift = float((mean - self.base.get("class", mean)).norm())
        return {**class_metrics(labels), "drift": drift}, {"class": mean}

    def measure_others(self) -> tuple[Metrics, dict[str, Tensor]]:
        rates = agreement(self.read("other")[0], self.others)
        return {f"other_{name}": rate for name, rate in rates.items()}, {}
