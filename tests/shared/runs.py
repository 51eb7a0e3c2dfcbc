"""The config of a short DreamBooth run on a tiny pipeline, and what such a run leaves behind."""

import json
import os
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.shared.oracles import assert_trained_alike
from trainers import dreambooth
from trainers.config import loading
from trainers.config.family_facts import family_facts
from trainers.distributed.trained_weights import trainable_parameters
from trainers.run import run

PRIOR = ("data.class_prompt=c", "data.num_class_images=3", "data.prior_loss_weight=0.5")

# of photos with several captions and tags, which the fixture `captioned_photos` has
VARIED_CAPTIONS = (
    "data.trigger=z",
    "data.caption_prefix=x",
    "data.caption_lines=choose",
    "data.shuffle_tags=true",
    "data.keep_tags=1",
    "data.tag_dropout=0.3",
    "data.caption_variants=3",
    "data.caption_dropout=0.2",
)


def lora(settings):
    return load_file(settings.output_dir / "pytorch_lora_weights.safetensors")


def read_metrics(settings):
    """The lines of metrics.jsonl."""
    lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def held_out_losses(settings):
    return [row["held_out_loss"] for row in read_metrics(settings) if "held_out_loss" in row]


def run_steps(settings, steps):
    """Run only the first steps; the run may go on from there."""
    train = settings.train.model_copy(update={"max_train_steps": steps})
    run(settings.model_copy(update={"train": train}))


def losses(settings):
    return [row["denoiser_loss"] for row in read_metrics(settings)]


def first_gradients(settings):
    """Loss and gradients of the first micro-batch, with B not at its zero start."""
    task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
    torch.manual_seed(5)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    batch, rng = next(iter(batches(0)))
    ((_, loss),) = task.losses(batch, rng)
    loss.backward()
    return (
        task,
        batch,
        rng.rows,
        loss,
        {name: p.grad for name, p in trainable_parameters(task.module).items()},
    )


def command(path, *overrides):
    return [sys.executable, "scripts/train.py", str(path), *overrides]


def environment(**more):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    }
    return clean | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


CACHED = "model.modulation_cache=true"


def assert_same(one, other):
    assert losses(one) == losses(other)
    assert lora(one).keys() == lora(other).keys()
    assert all(torch.equal(tensor, lora(other)[name]) for name, tensor in lora(one).items())


def assert_close(one, other):
    assert_trained_alike(
        (losses(one), losses(other)), (lora(one), lora(other)), one.optimizer.learning_rate
    )


def config_maker(bases, photos, folder):
    """A function: overrides, family -> Config of a six-step run on that family's tiny pipeline,
    which goes to folder/run."""

    def make(*overrides, family="sd15"):
        path = folder / "config.yaml"
        model = f"family: {family}, pretrained_model_name_or_path: {bases[family]}"
        if family_facts(family).config_keys["model"].count("max_sequence_length"):
            model += ", max_sequence_length: 10"
        path.write_text(
            f"""
output_dir: {folder}/run
model: {{{model}}}
lora: {{rank: 2}}
data: {{instance_data_dir: {photos}, instance_prompt: a b c, resolution: 16}}
optimizer: {{learning_rate: 1e-2}}
train: {{max_train_steps: 6, train_batch_size: 2}}
checkpoint: {{checkpointing_steps: 2}}
validation: {{num_inference_steps: 2, guidance_scale: 2}}
tracking: {{report_to: [], log_every: 1}}
"""
        )
        return loading.load_config(path, overrides)

    return make


@pytest.fixture
def settings(bases, photos, tmp_path):
    return config_maker(bases, photos, tmp_path)
