"""A tiny BLIP with random weights, saved as the Hub has such models."""

import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

WORDS = "a photo of dog cat star on grass the with and in red blue small large sits runs".split()
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]


def make_blip():
    torch.manual_seed(0)
    # weights so large that the pictures decide the words
    size = {
        "initializer_range": 0.5,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    text = {
        **size,
        "encoder_hidden_size": 16,
        "vocab_size": len(MARKS) + len(WORDS),
        "num_attention_heads": 2,
        "max_position_embeddings": 160,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "sep_token_id": 3,
    }
    vision = {**size, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    # the marks are never drawn, so that every caption has words
    model.text_decoder.cls.predictions.bias.data[: len(MARKS)] = -1e4
    return model


@pytest.fixture(scope="session")
def blip(tmp_path_factory):
    """The folder of a model that captions pictures with words from WORDS."""
    folder = tmp_path_factory.mktemp("blip")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*MARKS, *WORDS]))
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(images, BertTokenizer(str(vocabulary))).save_pretrained(folder)
    make_blip().save_pretrained(folder)
    return folder
