"""A small classifier of a data set's own classes, whose features measure a GAN."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from trainers.config import ImagesConfig, OptimizerConfig, TrainConfig
from trainers.data.imaging import to_float
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.from_scratch.image_sets import ImageBatches, ImageSet
from trainers.from_scratch.networks import Classifier
from trainers.metrics.feature_networks import NamedFeatures
from trainers.progress import is_terminal
from trainers.training.loop import Player, StepMetrics, train
from trainers.training.optimizers import make_lr_schedule, make_optimizer


def classifier_features(classifier: Classifier, test: ImageSet) -> NamedFeatures:
    """The last features of a classifier of the data set's own classes, of pictures (B, C, S, S)."""
    accuracy = (
        (classify(classifier, to_float(test.take(range(len(test))))) == test.labels).float().mean()
    )
    return f"classifier of the data set, accuracy {accuracy:.4f}", classifier.layers


class ClassifierTask:
    """The task of a classifier of a data set's own classes; a single process trains it."""

    def __init__(
        self, images: ImageSet, seed: int, optimizer: OptimizerConfig, accelerator: Accelerator
    ) -> None:
        torch.manual_seed(derive_seed(seed, "classifier"))
        self.module = Classifier(len(images[0]), int(images.labels.max()) + 1).to(images.device)
        groups = [{"params": list(self.module.parameters()), "lr": optimizer.learning_rate}]
        # prepared so that gradients which were scaled for float16 are unscaled before the step
        prepared = accelerator.prepare_optimizer(make_optimizer(optimizer, groups))
        self.players = {"classifier": Player(self.module, prepared)}

    def losses(self, batch: dict[str, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        yield "classifier", F.cross_entropy(self.module(to_float(batch["pixels"])), batch["label"])


def train_classifier(
    images: ImageSet, data: ImagesConfig, steps: int = 800, seed: int = 0
) -> Classifier:
    """A small network that tells the labels apart, the same for every run on the same pictures."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    optimizer = OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine")
    task = ClassifierTask(images, seed, optimizer, accelerator)
    batches = ImageBatches(images, data, BatchSlice(seed, 64))
    rate = make_lr_schedule(optimizer, steps)
    with tqdm(
        total=steps, desc="classifier to measure with", leave=False, disable=not is_terminal()
    ) as bar:

        def show_progress(step: int, metrics: StepMetrics) -> None:
            bar.update()

        config = TrainConfig(max_train_steps=steps)
        train(task, batches, config, seed, accelerator, rate, [show_progress])
    return task.module.eval()


@torch.no_grad()
def classify(classifier: Classifier, x: Tensor) -> Tensor:
    return torch.cat([classifier(part).argmax(1) for part in x.split(500)])
