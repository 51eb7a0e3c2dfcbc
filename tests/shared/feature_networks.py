"""Networks that are quick to measure with."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model

from tests.shared.tiny_pipelines import make_clip, make_tokenizer
from trainers.metrics.feature_networks import FeatureNetwork

MEAN_COLOUR = FeatureNetwork("mean colour", lambda x: x.mean((2, 3)) + 2)


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """A DINO and a CLIP, tiny and untrained, in folders as the Hub has them."""
    torch.manual_seed(0)
    dino, clip = tmp_path_factory.mktemp("dino"), tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, mlp_ratio=2, image_size=28, patch_size=14)).save_pretrained(
        dino
    )
    eye = CLIPVisionConfig(
        **size, intermediate_size=16, image_size=28, patch_size=14, projection_dim=16
    ).to_dict()
    both = CLIPConfig(
        text_config=make_clip().config.to_dict(), vision_config=eye, projection_dim=16
    )
    CLIPModel(both).save_pretrained(clip)
    make_tokenizer().save_pretrained(clip)
    return dino, clip
