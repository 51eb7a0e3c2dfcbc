"""Networks whose features pictures are compared by, from the Hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.errors import UserError

# the first that is at hand
DINO_NAMES = ("facebook/dinov2-base", "facebook/dinov2-small")
CLIP_NAMES = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")

# mean and deviation of the pixels that a network was trained on
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

NO_NETWORK_MESSAGE = (
    "no network to compare pictures with is on this machine. Fetch one with `hf download "
    "facebook/dinov2-small`, and for prompts `hf download openai/clip-vit-base-patch32`"
)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network with a name.

    image_features: pictures (B, 3, S, S) to features (B, D); text_features: prompts to features in
    the same space, which CLIP alone has. Pictures and features are on the CPU, wherever the network
    is.
    """

    name: str
    image_features: Callable[[Tensor], Tensor]
    text_features: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def encode_pictures(self, x: Tensor) -> Tensor:
        return F.normalize(
            torch.cat([self.image_features(part).float().cpu() for part in x.split(32)]), dim=1
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.text_features(prompts).float().cpu(), dim=1)


def find_networks(dino: str | None, clip: str | None, device: torch.device) -> list[FeatureNetwork]:
    """DINO and CLIP, as far as they are at hand; the first is the one to compare pictures with.

    dino, clip: a folder or a Hub name that is in the cache, else the usual names are tried; nothing
    is fetched. Raises: UserError when a given one is not at hand, or when none is.
    """
    networks = [
        load_first("--dino", dino, DINO_NAMES, load_dino, device),
        load_first("--clip", clip, CLIP_NAMES, load_clip, device),
    ]
    found = [network for network in networks if network]
    if not found:
        raise UserError(NO_NETWORK_MESSAGE)
    return found


def find_likeness_network(name: str | None, device: torch.device) -> FeatureNetwork:
    """The network of `validation.likeness_network`; without a name the first that is at hand.

    Raises: UserError, as `find_networks`.
    """
    if name is not None:
        return load_first("validation.likeness_network", name, (), load_dino, device)
    return find_networks(None, None, device)[0]


def load_first(
    option: str,
    requested: str | None,
    defaults: Sequence[str],
    load: Callable[..., FeatureNetwork],
    device,
) -> FeatureNetwork | None:
    for name in [requested] if requested else defaults:
        try:
            return load(name, device)
        except (OSError, ValueError) as error:
            if requested:
                raise UserError(
                    f"{option} {name}: not on this machine ({error}). Give a folder, or `hf "
                    f"download {name}` first"
                ) from None
    return None


def load_dino(name: str, device: torch.device) -> FeatureNetwork:
    """The class token of a vision transformer trained without labels (Caron et al. 2021, Oquab et
    al. 2024)."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, local_files_only=True).to(device).eval()
    return FeatureNetwork(
        f"DINO ({name})",
        lambda x: model(preprocess(x.to(device), 224, IMAGENET)).last_hidden_state[:, 0],
    )


def load_clip(name: str, device: torch.device) -> FeatureNetwork:
    """Pictures and prompts in one space (Radford et al. 2021)."""
    from transformers import (
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    vision = (
        CLIPVisionModelWithProjection.from_pretrained(name, local_files_only=True).to(device).eval()
    )
    text = (
        CLIPTextModelWithProjection.from_pretrained(name, local_files_only=True).to(device).eval()
    )
    tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True)
    size = vision.config.image_size

    def text_features(prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(
            device
        )
        return text(**ids).text_embeds

    return FeatureNetwork(
        f"CLIP ({name})",
        lambda x: vision(preprocess(x.to(device), size, CLIP_PIXELS)).image_embeds,
        text_features,
    )


NamedFeatures = tuple[str, Callable[[Tensor], Tensor]]  # of a network; of pictures (B, C, S, S)


def dino_features(device: torch.device) -> NamedFeatures:
    """DINO's features, of gray pictures too (FD-DINOv2: Stein et al. 2023). Raises: UserError."""
    network = load_first("--dino", None, DINO_NAMES, load_dino, device)
    if network is None:
        raise UserError(NO_NETWORK_MESSAGE)
    return network.name, lambda x: network.image_features(x.expand(-1, 3, -1, -1))


def inception_features(device: torch.device) -> NamedFeatures:
    """The network of published FIDs, by torch-fidelity, which fetches its weights."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return "Inception v3 (torch-fidelity)", lambda x: net(
        ((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().byte()
    )


# what a GAN may be measured in besides a classifier, by the config's names
FEATURE_NETWORKS = {"dino": dino_features, "inception": inception_features}


def preprocess(x: Tensor, size: int, pixels: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Pictures as a network was trained to see them."""
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    mean, deviation = (x.new_tensor(values)[:, None, None] for values in pixels)
    return ((x + 1) / 2 - mean) / deviation
