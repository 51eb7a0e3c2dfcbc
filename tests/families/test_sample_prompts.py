"""A prompt with settings of its own is sampled as the pipeline's own call does with them."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from trainers import dreambooth
from trainers.config.loading import dump_config, parse_tree
from trainers.config.yaml_text import parse_yaml
from trainers.distributed.trained_weights import trainable_parameters
from trainers.publishing.embedding import final_pictures
from trainers.publishing.public import public_text

OWN = {
    "prompt": "x",
    "negative_prompt": "b",
    "seed": 7,
    "width": 32,
    "height": 16,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "lora_scale": 0.5,
}
PROMPTS = f"validation.prompts=[a b c, {OWN}, {{prompt: y, size: 32}}]"


def picture(source):
    return np.asarray(source).astype(int)


def test_each_prompt_is_sampled_with_its_own_settings(settings, tmp_path):
    config = settings(PROMPTS, "validation.negative_prompt=c", "validation.seed=2")
    task, _, _ = dreambooth.build(config, Accelerator(cpu=True))
    torch.manual_seed(1)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    task.sample(tmp_path / "samples")
    (tmp_path / "lora").mkdir()
    task.save(tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(config.model.pretrained_model_name_or_path)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "c", "seed": 2}
    calls = [
        {**common, "prompt": "a b c", "width": 16, "height": 16},
        OWN,
        {**common, "prompt": "y", "width": 32, "height": 32},
    ]
    for i, arguments in enumerate(calls):
        call = dict(arguments)
        seed, scale = call.pop("seed"), call.pop("lora_scale", 1.0)
        expected = pipe(
            **call,
            generator=torch.Generator().manual_seed(seed),
            cross_attention_kwargs={"scale": scale},
        ).images[0]
        found = Image.open(tmp_path / f"samples/{i:02d}-0.png")
        assert found.size == expected.size
        # the layers of the training round otherwise than those of diffusers
        assert abs(picture(found) - picture(expected)).max() <= 1
    scalings = [layer.scaling for layer in task.module.modules() if hasattr(layer, "scaling")]
    assert all(value == 1 for scaling in scalings for value in scaling.values())


def test_its_settings_are_told_and_stay_in_the_config(settings, tmp_path):
    config = settings(PROMPTS, "data.trigger=zwx", f"output_dir={tmp_path}")
    own = config.validation.samples[1]
    assert own.caption.startswith("x (negative prompt b, seed 7, width 32, height 16, num inf")
    read, mistakes = parse_tree(parse_yaml(dump_config(config)))
    assert (read, mistakes) == (config, {})
    assert "lora_scale: 0.5" in public_text(config)
    (tmp_path / "samples/final").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples/final/01-0.png")
    assert f"<figcaption>{own.caption}</figcaption>" in final_pictures(tmp_path, config)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{prompt: b, sed: 3}", r"prompts\[b\]\.sed: unknown key; did you mean .*\.seed"),
        ("{seed: 3}", r"prompts\[\]\.prompt: a prompt with settings .* has to have a text"),
        ("{prompt: b, width: 30}", r"prompts\[b\]\.width: must be a multiple of 8, not 30"),
        ("{prompt: b, size: 32, width: 32}", r"prompts\[b\]\.size: cannot be combined"),
        ("{prompt: b, num_inference_steps: 0}", r"prompts\[b\]\.num_inference_steps: .*not 0"),
        ("{prompt: 'b {trigger}'}", r"validation\.prompts: 'b \{trigger\}' has a place for"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_told(settings, prompt, message):
    with pytest.raises(Exception, match=message):
        settings(f"validation.prompts=[a, {prompt}]")


def test_the_trigger_is_written_into_prompts_with_settings(settings):
    prompt = "{prompt: 'a {trigger}', negative_prompt: '[trigger] b'}"
    config = settings(f"validation.prompts=[{prompt}]", "data.trigger=zwx")
    assert config.validation.texts == ["a zwx"]
    assert config.validation.negative_texts == ["", "zwx b"]
