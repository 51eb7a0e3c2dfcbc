"""While a LoRA trains, what it draws is compared with the photos and with what the base draws."""

import pytest
import torch
from accelerate import Accelerator

from tests.shared.feature_networks import MEAN_COLOUR
from tests.shared.runs import PRIOR
from trainers import dreambooth
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import UserError
from trainers.lora import likeness
from trainers.metrics import feature_networks

DRAWN = ("validation.likeness_pictures=2", *PRIOR)


@pytest.fixture
def by_color(monkeypatch):
    monkeypatch.setattr(likeness, "find_likeness_network", lambda name, device: MEAN_COLOUR)


def test_a_lora_that_is_still_zero_has_not_moved_the_class(settings, by_color):
    task, _, _ = dreambooth.build(settings(*DRAWN), Accelerator(cpu=True))
    before = task.validate()
    assert list(before) == ["subject", "prior_drift", "class_bleed", "subject_less_drift"]
    assert (before["prior_drift"], before["class_bleed"]) == (0, 0)
    torch.manual_seed(1)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    after = task.validate()
    assert after["prior_drift"] > 0
    assert after["subject_less_drift"] == after["subject"] - after["prior_drift"]
    # the base's pictures are drawn without the LoRA, whatever it is by then, and it is put back
    kept, task.likeness.base_features = task.likeness.base_features, None
    assert task.validate() == pytest.approx(after, abs=1e-6)
    assert torch.allclose(task.likeness.base_features, kept, atol=1e-6)
    assert all(p.requires_grad for p in trainable_parameters(task.module).values())


def test_a_network_that_is_asked_for_and_not_there_is_told_before_the_training(
    settings, monkeypatch
):
    for names in ("DINO_NAMES", "CLIP_NAMES"):
        monkeypatch.setattr(feature_networks, names, ())
    with pytest.raises(UserError, match="no network to compare pictures with"):
        dreambooth.build(settings(*DRAWN), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.early_stop.metric=subject",), "subject needs validation.likeness_pictures"),
        (
            ("train.early_stop.metric=prior_drift", "validation.likeness_pictures=1"),
            "prior_drift needs lora and data.class_prompt",
        ),
        (("train.early_stop.metric=dice",), "'dice' is not one of held_out_loss, "),
        (("train.early_stop={}",), "nothing is measured that could stop .* data.held_out_dir"),
        (("checkpoint.keep_best=true",), "tell which is the best: it needs data.held_out_dir"),
        (("hub.weights=best",), "there is no best without a measurement"),
        (
            (
                "train.early_stop.patience=3",
                "validation.likeness_pictures=1",
                "validation.validation_steps=2",
                "train.max_train_steps=6",
            ),
            "3 validations, one every 2 steps, take all of the 6 steps",
        ),
        (("train.early_stop.patienc=1",), "unknown key; did you mean train.early_stop.patience"),
    ],
)
def test_what_cannot_be_measured_is_a_mistake_in_the_config(settings, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(*overrides)
