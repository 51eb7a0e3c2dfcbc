"""A family holds no weights that it does not use."""

import gc
import weakref

import pytest

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.families import ALL, TEXT
from trainers.families import FAMILIES, Family
from trainers.run import run


@pytest.fixture
def loads(monkeypatch):
    """For each load: the parts that were still in memory before it, and those that it brought."""
    seen, parts, load = [], [], Family.load

    def noted(family, *names):
        gc.collect()
        alive = {name for name, part in parts if part() is not None}
        load(family, *names)
        parts.extend((name, weakref.ref(getattr(family.pipe, name))) for name in names)
        seen.append((alive, set(names)))

    monkeypatch.setattr(Family, "load", noted)
    return seen


ONCE = (
    "data.class_prompt=c",
    "data.num_class_images=1",
    "validation.prompts=[a b c]",
    "train.max_train_steps=1",
)


@pytest.mark.parametrize("text", [(), (TEXT,)], ids=["denoiser", "and text encoders"])
@pytest.mark.parametrize("name", by_hand_but(EACH_TIME, ALL))
def test_no_text_encoder_is_in_memory_with_the_denoiser_unless_it_trains(
    settings, loads, name, text
):
    """From class pictures to the last sample: encoders load one at a time, and whatever loads finds
    memory empty."""
    config = settings(*ONCE, *text, family=name)
    run(config)
    family = FAMILIES[name](config.model)
    frozen = set(family.text_encoder_names) - set(family.clip_encoders if text else ())
    for alive, brought in loads:
        assert not alive, loads
        # nothing is brought where only captions are counted
        assert not frozen & brought if family.denoiser_name in brought else len(brought) <= 1, loads
    assert (
        sum(family.denoiser_name in brought for _, brought in loads) == 3
    )  # class pictures, training, proof
    assert frozen <= {part for _, brought in loads for part in brought}


def test_a_t5_that_is_left_out_is_never_loaded(settings, loads):
    run(
        settings(
            "model.text_encoder_3=null", "data.cache=false", "train.max_train_steps=1", family="sd3"
        )
    )
    assert {"text_encoder", "text_encoder_2"} <= set.union(*(brought for _, brought in loads))
    assert not any("text_encoder_3" in brought for _, brought in loads)


def test_a_family_that_is_no_longer_used_frees_its_weights(settings):
    """A cache of its methods held every family of the process, and with it a denoiser on the
    GPU."""
    config = settings()
    family = FAMILIES["sd15"](config.model)
    family.load("unet")
    assert (family.vae_scale_factor, family.component_digest("unet")) == (
        2,
        family.component_digest("unet"),
    )
    weights = weakref.ref(family.denoiser.conv_in.weight)
    del family
    gc.collect()
    assert weights() is None
