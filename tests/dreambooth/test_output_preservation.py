"""Output preservation: the base's own predictions are what the rows that keep its class learn."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.families import ALL, FLOWS, TEXT, guided, whole
from tests.shared.processes import launch
from tests.shared.runs import (
    CACHED,
    assert_close,
    assert_same,
    first_gradients,
    run_steps,
)
from trainers import dreambooth
from trainers.banners import describe_photos
from trainers.config import DataConfig, loading
from trainers.data.crops import GEOMETRY
from trainers.data.dreambooth_batches import passes
from trainers.distributed.trained_weights import trainable_parameters
from trainers.encoded_pictures import told_prompts
from trainers.errors import UserError
from trainers.run import run

KEPT = ("data.class_prompt=c", "data.prior=output_preservation", "data.prior_loss_weight=0.5")
OTHERS = "data.preserve_prompts=[a b, b]"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def trained_a_little(settings):
    """A task whose LoRA is not at its zero start, and its first micro-batch with its draws."""
    task, batches, _ = dreambooth.build(settings, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task, *next(iter(batches(0)))


def noisy(task, batch, rng):
    x0, eps, t = task.draw_inputs(batch, rng)
    objective = task.objective(x0.shape[-2:])
    return objective.corrupt(x0, eps, t), t, objective.target(x0, eps, t)


@pytest.mark.parametrize("more", [(), (TEXT,)], ids=["denoiser", "and text encoders"])
@pytest.mark.parametrize("family", ALL)
def test_with_its_lora_off_the_model_is_the_base_to_the_bit(settings, family, more):
    config = settings(*KEPT, *more, *guided(family), family=family)
    task, batch, rng = trained_a_little(config)
    x_t, t, _ = noisy(task, batch, rng)
    base, rows = whole(config), []
    for prompt in ["a b c"] * 2 + ["c"] * 2:
        outputs = [base.encode_prompt(name, prompt) for name in base.text_encoder_names]
        rows.append({key: value for output in outputs for key, value in output.items()})
    text = {key: torch.cat([row[key][None] for row in rows]) for key in rows[0]}
    text[GEOMETRY] = batch[GEOMETRY]
    with torch.no_grad():
        expected = base.denoise(base.denoiser, x_t, t, text)
    weights = trainable_parameters(task.module)
    key, inputs = next(passes(batch, rng, x_t, t))
    found = task.predict(key, inputs, is_base=True)
    if more:
        # the encoder computes several prompts at once, and one is encoded alone
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert not found.requires_grad
    assert trainable_parameters(task.module).keys() == weights.keys()
    assert not torch.allclose(task.predict(key, inputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", [(), (TEXT,)], ids=["denoiser", "and text encoders"])
@pytest.mark.parametrize("family", ALL)
def test_loss_and_every_gradient_equal_an_independent_step(settings, bases, family, more):
    """The target comes from a base that was loaded anew, the photos' noisy latents and the class
    prompt."""
    config = settings(*KEPT, *more, *guided(family), family=family)
    task, batch, rows, loss, gradients = first_gradients(config)
    assert rows == [0, 1, 0, 1]
    _, rng = next(iter(task.batches(0)))
    x_t, t, target = noisy(task, batch, rng)
    assert torch.equal(x_t[:2], x_t[2:])
    base, fresh = whole(config), DiffusionPipeline.from_pretrained(bases[family])
    outputs = [base.encode_prompt(name, "c") for name in base.text_encoder_names]
    text = {key: torch.stack([v] * 2) for output in outputs for key, v in output.items()}
    text[GEOMETRY] = batch[GEOMETRY][2:]
    denoiser = getattr(fresh, base.denoiser_name)
    with torch.no_grad():
        kept = base.denoise(denoiser, x_t[2:], t[2:], text)
    task.module.zero_grad()
    (_, inputs), _ = passes(batch, rng, x_t, t)
    prediction = task.module(*inputs)
    expected = F.mse_loss(prediction[:2], target[:2]) + 0.5 * F.mse_loss(prediction[2:], kept)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trainable_parameters(task.module).items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


RUNS = {
    "denoiser": (),
    "text encoders": (TEXT, OTHERS),
    "checkpointed, dropped": ("train.gradient_checkpointing=true", "lora.dropout=0.3"),
}


@pytest.mark.parametrize("more", by_hand_but(["text encoders"], RUNS))
@pytest.mark.parametrize("family", by_hand_but(EACH_TIME, ALL))
def test_three_steps_and_three_more_equal_six(settings, tmp_path, family, more):
    one, parts = (
        settings(*KEPT, *RUNS[more], f"output_dir={tmp_path}/{name}", family=family)
        for name in ("one", "parts")
    )
    run(one)
    run_steps(parts, 3)
    run(parts)
    assert_same(one, parts)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_batch_does_not_depend_on_how_it_is_divided(settings, tmp_path, family):
    runs = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        batch = (f"train.train_batch_size={size}", f"train.gradient_accumulation_steps={parts}")
        runs.append(settings(*KEPT, OTHERS, *batch, f"output_dir={tmp_path}/{size}", family=family))
        run(runs[-1])
    assert_close(*runs[:2])
    assert_close(runs[0], runs[2])


@pytest.mark.parametrize("more", [CACHED, "train.gradient_checkpointing=true"])
@pytest.mark.parametrize("family", FLOWS)
def test_memory_options_change_no_bit(settings, monkeypatch, tmp_path, family, more):
    monkeypatch.setattr(dreambooth, "STEPS_PRECOMPUTED", 2)
    plain, saving = (
        settings(*KEPT, OTHERS, *added, f"output_dir={tmp_path}/{len(added)}", family=family)
        for added in ((), (more,))
    )
    run(plain)
    run_steps(saving, 3)
    run(saving)
    assert_same(plain, saving)


@pytest.mark.parametrize(
    "environment",
    [pytest.param({}, id="DDP"), pytest.param(FSDP, id="FSDP2", marks=pytest.mark.slow)],
)
def test_two_processes_train_as_one(settings, tmp_path, environment):
    one, two = (
        settings(*KEPT, OTHERS, f"train.train_batch_size={size}", f"output_dir={tmp_path}/{size}")
        for size in (2, 1)
    )
    run(one)
    (tmp_path / "two.yaml").write_text(loading.dump_config(two))
    log = tmp_path / "log"
    ended = launch("train.py", tmp_path / "two.yaml", log=log, processes=2, **environment)
    assert ended == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    assert_close(one, two)


@pytest.mark.parametrize("others", [[], ["x"], ["x", "y", "z", "u"]])
@pytest.mark.parametrize("classes", ["c", ["c", "d"], ["c", "d", "e"]])
def test_every_third_row_is_told_another_thing_and_each_as_often_as_the_next(classes, others):
    data = DataConfig(class_prompt=classes, preserve_prompts=others)
    (photos,) = data.sets
    turns = told_prompts(photos, data)
    counts = Counter(turns)
    assert counts.keys() == {*photos.class_prompts, *others}
    for part in (photos.class_prompts, others):
        assert len({counts[prompt] for prompt in part}) <= 1
    assert turns[2::3] == [prompt for prompt in turns if prompt in others] or not others
    assert sum(counts[prompt] for prompt in others) * 3 == len(turns) * bool(others)


def test_what_was_kept_is_compared_when_a_run_goes_on(settings):
    run_steps(settings(*KEPT, OTHERS), 2)
    for changed in ("data.preserve_prompts=[a b]", "data.class_prompt=b"):
        with pytest.raises(UserError, match=changed.partition("=")[0]):
            run(settings(*KEPT, OTHERS, changed))


def test_banner_and_card_say_it_and_no_picture_is_drawn(settings, capsys):
    config = settings(*KEPT, OTHERS, "train.max_train_steps=1")
    run(config)
    assert "  kept        the base's outputs for c, a b, b, weight 0.5\n" in capsys.readouterr().out
    card = (config.output_dir / "README.md").read_text()
    assert "none; the base's own outputs on the pictures for 'c', 'a b', 'b', weight 0.5" in card
    assert not [*config.output_dir.rglob("class-*.png")]


def test_without_a_prior_the_rows_are_the_photos_alone(settings):
    pictures = ("data.num_class_images=3", "data.prior=class_images")
    for asked in (KEPT, (*KEPT, OTHERS), (*KEPT, *pictures)):
        task, batches, _ = dreambooth.build(
            settings(*asked, "data.prior=none"), Accelerator(cpu=True)
        )
        ((batch, _),) = batches(0)
        assert batch["weight"].tolist() == [0.5, 0.5]
    assert dict(describe_photos(task.config, batches))["class"] == "not kept (data.prior=none)"


def test_each_concept_keeps_its_own_class_and_masks_none_of_it(settings, photos, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in photos.iterdir():
        with Image.open(path) as photo:
            Image.new("L", photo.size).save(masks / path.name)
    shared = {"instance_data_dir": str(photos), "instance_prompt": "a b c"}
    listed = [
        {"name": "rex", "class_prompt": "c", "mask_dir": str(masks), **shared},
        {"name": "tom", "class_prompt": "b", **shared},
    ]
    nothing = ("data.instance_data_dir=null", "data.instance_prompt=null")
    prior = ("data.prior=output_preservation", f"data.concepts={json.dumps(listed)}")
    config = settings(*nothing, *prior, "data.mask_floor=0", "train.train_batch_size=8")
    _, batches, _ = dreambooth.build(config, Accelerator(cpu=True))
    classes = {"rex": "c", "tom": "b"}
    (rows,) = batches.micro_batch_rows()
    concepts = {batches.picture(0, row).concept for row in rows}
    assert concepts == classes.keys()
    for row in rows[8:]:
        picture = batches.picture(0, row)
        assert batches.text(0, row, picture) == classes[picture.concept]
    ((batch, _),) = batches(0)
    shown = [batches.picture(0, row).concept == "tom" for row in rows[:8]]
    assert batch["mask"].mean((1, 2, 3)).tolist() == [*map(float, shown), *[1.0] * 8]


REFUSED = {
    ("lora=null",): "data.prior: output_preservation asks the base",
    ("data.class_data_dir=somewhere",): "data.class_data_dir: somewhere, but",
    ("data.class_prompt=null",): "data.class_prompt: data.prior=output_preservation requires",
    (
        "data.prior=class_images",
        "data.num_class_images=2",
        OTHERS,
    ): "data.preserve_prompts: has no effect without",
}


@pytest.mark.parametrize("prior", ["output_preservation", "none"])
def test_a_number_of_class_pictures_that_has_no_effect_is_told(settings, prior):
    with pytest.warns(UserWarning, match=f"num_class_images=3 has no effect: .*{prior}"):
        settings("data.class_prompt=c", f"data.prior={prior}", "data.num_class_images=3")


@pytest.mark.parametrize("overrides", REFUSED, ids=str)
def test_what_it_cannot_do_is_refused(settings, overrides):
    with pytest.raises(UserError, match=REFUSED[overrides]):
        settings(*KEPT, *overrides)
