"""Updates of layers: stacked and split exactly, compared without their products, and merged."""

import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.shared.processes import ROOT
from tests.shared.saved_loras import family_of
from trainers.errors import UserError
from trainers.lora import kohya
from trainers.lora.base_layers import adaptable_shapes, extract_lora, merge_lora
from trainers.lora.files import read_lora
from trainers.lora.formats import load_format
from trainers.lora.update import (
    LoraUpdate,
    max_relative_difference,
    relative_difference,
    split_update,
    stack_updates,
)
from trainers.run import run
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


def update(outputs=5, rank=2, inputs=(7,), seed=0):
    rng = torch.Generator().manual_seed(seed)
    b = torch.randn(outputs, rank, *[1] * (len(inputs) - 1), generator=rng)
    return LoraUpdate(torch.randn(rank, *inputs, generator=rng), b)


# The distance


@pytest.mark.parametrize("inputs", [(7,), (3, 3, 3)])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 4), (6, 3)])
def test_the_distance_is_that_of_the_products(inputs, ranks):
    a, b = (update(rank=rank, inputs=inputs, seed=i) for i, rank in enumerate(ranks))
    products = [x.delta_weight().double() for x in (a, b)]
    expected = float((products[0] - products[1]).norm() / products[0].norm())
    assert relative_difference(a, b) == pytest.approx(expected, rel=1e-5)


def test_near_updates_are_near_whatever_their_factors():
    a = update(20, 4, (30,))
    mixer = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    assert 0 < relative_difference(a, LoraUpdate(mixer @ a.a, a.b @ mixer.T)) < 1e-5
    assert relative_difference(a, LoraUpdate(a.a * 1.001, a.b)) == pytest.approx(1e-3, rel=1e-3)


def test_the_product_is_never_made(monkeypatch):
    def refuse(self):
        raise AssertionError("a product of a wide layer is a gigabyte")

    monkeypatch.setattr(LoraUpdate, "delta_weight", refuse)
    a, b = update(200_000, 1, (200_000,)), update(200_000, 1, (200_000,), seed=1)
    assert relative_difference(a, b) == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_a_lora_of_flux_is_written_and_compared_within_4_gib(form):
    command = [sys.executable, "tests/export_memory.py", form]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "difference 0.0e+00" in done.stdout
    assert float(re.search(r"peak ([\d.]+) GiB", done.stdout)[1]) < 4


def test_a_layer_without_an_update_is_one_that_adds_zero():
    zero = LoraUpdate(torch.ones(2, 7), torch.zeros(5, 2))
    assert max_relative_difference({"x": zero}, {}) == 0
    assert max_relative_difference({}, {"x": zero}) == 0
    assert max_relative_difference({"x": update()}, {}) == pytest.approx(1)
    assert max_relative_difference({}, {"x": update()}) == float("inf")
    assert max_relative_difference({"x": zero}, {"x": update()}) == float("inf")


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_file_is_replaced_by_a_whole_one_only(bases, tmp_path, monkeypatch, form):
    family, file = family_of(bases["sd15"], "sd15"), tmp_path / WEIGHT_NAME
    layer = "unet.mid_block.attentions.0.proj_in"
    outputs, *inputs = adaptable_shapes(family)[layer]
    load_format(form).write({layer: update(outputs, 2, inputs)}, family, file, {})
    before = file.read_bytes()

    def fill_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("trainers.tensor_file.save_file", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        load_format(form).write({layer: update(outputs, 1, inputs)}, family, file, {})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHT_NAME]


# Layers that are rows of another


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("zero", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_a_layer_that_never_trained_is_there_again(shared, zero):
    outputs = [4, 5, 6]
    updates = [update(rows, seed=i) for i, rows in enumerate(outputs)]
    for i in range(3):
        a = updates[0].a if shared else updates[i].a
        b = updates[i].b * 0 if i in zero else updates[i].b
        updates[i] = LoraUpdate(a, b)
    back = split_update(stack_updates(updates, outputs), outputs)
    # where one layer uses all of a shared `a` alone, the others may as well be absent
    if shared and len(zero) == 2:
        back = [part or old for part, old in zip(back, updates, strict=True)]
    for old, new in zip(updates, back, strict=True):
        assert torch.equal(new.delta_weight(), old.delta_weight())


def test_a_layer_that_has_no_update_has_none_again():
    outputs = [4, 5, 6]
    stacked = stack_updates([update(4), None, update(6, seed=1)], outputs)
    first, none, last = split_update(stacked, outputs)
    assert none is None
    assert torch.equal(first.b, update(4).b)
    assert torch.equal(last.b, update(6, seed=1).b)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_kohya_file_with_layers_that_never_trained_is_the_same_lora(bases, tmp_path, name):
    family, lora = family_of(bases[name], name), {}
    for i, (layer, (outputs, *inputs)) in enumerate(adaptable_shapes(family).items()):
        made = update(outputs, 2, inputs, seed=i)
        lora[layer] = LoraUpdate(made.a, made.b * (i % 3 > 0))
    kohya.write(lora, family, tmp_path / KOHYA_NAME, {})
    back = read_lora(tmp_path / KOHYA_NAME, family)
    assert back.keys() == lora.keys()
    assert max_relative_difference(lora, back) == 0


def test_a_run_of_sd3_with_a_kohya_file_ends(settings):
    """The queries of its last block's text never have a gradient."""
    config = settings("lora.kohya=true", "train.max_train_steps=1", family="sd3")
    run(config)
    state = load_file(config.output_dir / WEIGHT_NAME)
    untrained = [key for key, b in state.items() if ".lora_B." in key and not b.any()]
    assert untrained == ["transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"]
    assert (config.output_dir / KOHYA_NAME).is_file()


# Merging and extracting


def test_a_lora_that_adds_nothing_is_merged_and_loses_nothing(bases):
    family = family_of(bases["sd15"], "sd15")
    family.load(family.denoiser_name, *family.clip_encoders)
    layer = "unet.mid_block.attentions.0.proj_in"
    shape = adaptable_shapes(family)[layer]
    zero = LoraUpdate(torch.ones(1, *shape[1:]), torch.zeros(shape[0], 1, 1, 1))
    assert merge_lora(family, {layer: zero}) == 0


def test_a_sum_that_float16_cannot_hold_is_refused(bases):
    family = family_of(bases["sd15"], "sd15")
    family.dtype = torch.float16
    family.load(family.denoiser_name, *family.clip_encoders)
    layer = "unet.mid_block.attentions.0.proj_in"
    shape = adaptable_shapes(family)[layer]
    large = LoraUpdate(torch.ones(1, *shape[1:]), torch.full((shape[0], 1, 1, 1), 1e5))
    with pytest.raises(UserError, match=r"proj_in.*float16 cannot hold"):
        merge_lora(family, {layer: large})


def test_a_difference_is_of_two_pipelines_of_one_model_that_differ(bases, tmp_path):
    with pytest.raises(UserError, match="nothing was trained"):
        extract_lora(family_of(bases["sd15"], "sd15"), family_of(bases["sd15"], "sd15"), 2)
    pipe = DiffusionPipeline.from_pretrained(bases["sd15"])
    pipe.unet.conv_out.weight.data[0] = float("nan")
    pipe.save_pretrained(tmp_path / "sd15")
    with pytest.raises(UserError, match=r"conv_out has numbers that are NaN"):
        extract_lora(family_of(bases["sd15"], "sd15"), family_of(tmp_path / "sd15", "sd15"), 2)
