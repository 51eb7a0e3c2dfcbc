"""Features are those of transformers."""

import pytest
import torch
from transformers import CLIPModel, Dinov2Model

from tests.shared.tiny_pipelines import make_tokenizer
from trainers.errors import UserError
from trainers.metrics import feature_networks


def test_features_are_those_of_transformers(nets):
    dino, clip = feature_networks.find_networks(str(nets[0]), str(nets[1]), torch.device("cpu"))
    assert dino.name.startswith("DINO")
    assert clip.name.startswith("CLIP")
    x = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def seen(mean, deviation, x):
        return ((x + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[
            :, None, None
        ]

    model = Dinov2Model.from_pretrained(nets[0]).eval()
    with torch.no_grad():
        token = model(seen((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), x)).pooler_output
    assert torch.allclose(
        dino.encode_pictures(x), token / token.norm(dim=1, keepdim=True), atol=1e-5
    )
    x, prompts, tokenizer = x[..., :28, :28], ["a b", "c d e f", "g"], make_tokenizer()
    model = CLIPModel.from_pretrained(nets[1]).eval()
    pixels = seen((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), x)
    with torch.no_grad():
        cosines = model(
            **tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=pixels
        ).logits_per_image
    cosines = cosines / model.logit_scale.exp().detach()
    assert torch.allclose(
        clip.encode_pictures(x) @ clip.encode_prompts(prompts).T, cosines, atol=1e-5
    )


def test_gray_pictures_have_features_too(monkeypatch, nets):
    monkeypatch.setattr(feature_networks, "DINO_NAMES", (str(nets[0]),))
    name, features = feature_networks.dino_features(torch.device("cpu"))
    assert name == f"DINO ({nets[0]})"
    gray = torch.rand(2, 1, 28, 28)
    assert torch.equal(features(gray), features(gray.expand(-1, 3, -1, -1)))


def test_without_a_network_the_message_says_how_to_fetch_one(monkeypatch):
    monkeypatch.setattr(feature_networks, "DINO_NAMES", ())
    with pytest.raises(UserError, match="hf download facebook/dinov2-small"):
        feature_networks.dino_features(torch.device("cpu"))
