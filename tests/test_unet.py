"""What a U-Net is shown, what is wanted of it, how it is judged, and how it reads pictures of any
size."""

import io
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from kornia.color import lab_to_rgb, rgb_to_lab
from oracles import check_each_players_step
from PIL import Image
from processes import start
from sklearn.metrics import f1_score, jaccard_score
from torch import nn

from trainers.config import ImagesConfig, PairsConfig, loading
from trainers.data.imaging import mirror_pad
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.data.sampler import BatchSlice
from trainers.errors import UserError
from trainers.from_scratch.augment import augment
from trainers.from_scratch.image_sets import (
    ImageBatches,
    ImageSample,
    ImageSet,
    load_images,
    samples_from_pairs,
)
from trainers.from_scratch.tiling import predict_tiled, tile_offsets
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.colorize import AB_SCALE, ab_bins, nearest_bin, rgb_pixels_to_lab
from trainers.from_scratch.uses.segment import read_mask
from trainers.metrics.image_quality import colorfulness, confusion_metrics, psnr, sharpness, ssim
from trainers.run import run
from trainers.unet import UNetTask


@pytest.fixture(scope="module")
def coloured(blobs, tmp_path_factory):
    """Folder of pictures in colour, without masks."""
    folder = tmp_path_factory.mktemp("coloured")
    for path in blobs.glob("*_image.png"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def settings(blobs, coloured, tmp_path):
    """A function: use, overrides -> Config of a short run on the blobs."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
kind: unet
output_dir: {tmp_path}/run
model: {{width: 8, levels: 2}}
data: {{image_dir: {coloured}, folds: 4, channels: 3, resolution: 16}}
optimizer: {{learning_rate: 1e-2}}
train: {{max_train_steps: 50, train_batch_size: 4}}
tracking: {{report_to: [], log_every: 10}}
"""
    )
    pairs = [f"data.image_dir={blobs}"]
    sources = {"segment": pairs, "pix2pix": [*pairs, "data.target_suffix=_target"]}
    return lambda use, *overrides: loading.load_config(
        path, [f"use={use}", *sources.get(use, []), *overrides]
    )


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return (256 * random(*shape, seed=seed)).byte()


def draws(n, step=0):
    return SampleRng(0, step, range(n))


# Changes of training pictures

SQUARE = {  # the symmetries of a square
    f"{turns}{'f' * flipped}": (
        lambda x, t=turns, f=flipped: (x.flip(-1) if f else x).rot90(t, (-2, -1))
    )
    for turns in range(4)
    for flipped in range(2)
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"random_flip"}, {"0", "0f"}),
        ({"random_vertical_flip"}, {"0", "2f"}),
        ({"random_rotate"}, {"0", "1", "2", "3"}),
        ({"random_flip", "random_vertical_flip", "random_rotate"}, set(SQUARE)),
    ],
)
def test_flips_and_turns_give_each_symmetry_of_the_square_that_they_can(keys, expected):
    x = pixels(1, 2, 8, 8).expand(200, 2, 8, 8)
    y = augment(x, ImagesConfig(**dict.fromkeys(keys, True)), draws(200), num_mask_channels=1)
    found = [{name for name, turn in SQUARE.items() if torch.equal(turn(x[0]), row)} for row in y]
    assert all(len(names) == 1 for names in found)
    counts = {name: sum(name in names for names in found) for name in SQUARE}
    assert {name for name, count in counts.items() if count} == expected
    assert min(counts[name] for name in expected) > 200 / len(expected) / 2


def test_without_changes_pictures_stay_as_they_are():
    x = pixels(3, 2, 8, 8)
    assert torch.equal(augment(x, ImagesConfig(), draws(3), num_mask_channels=1), x)


def test_a_picture_and_its_mask_move_alike_and_the_mask_keeps_its_values():
    """The mask is where the picture is bright, before and after."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    hills = torch.stack(
        [40 * (torch.sin(x / 5 + k) + torch.cos(y / 4 - k)) + 128 for k in range(20)]
    )
    mask = 3 * (hills > 128) + 255 * (hills < 80)
    both = torch.stack([hills, mask], 1).byte()
    every = {
        "random_flip": True,
        "random_vertical_flip": True,
        "random_rotate": True,
        "elastic": 3.0,
    }
    image, moved = augment(both, ImagesConfig(**every), draws(20), num_mask_channels=1).unbind(1)
    assert set(moved.unique().tolist()) == {0, 3, 255}
    assert ((moved == 3) == (image > 128)).float().mean() > 0.95
    assert ((moved == 255) == (image < 80)).float().mean() > 0.95
    assert ((moved == 3) == (hills > 128)).float().mean() < 0.8


def test_the_batches_of_a_task_keep_the_classes_of_its_masks(blobs, tmp_path, settings):
    for path in blobs.glob("*_image.png"):
        shutil.copy(path, tmp_path)
        mask = np.asarray(Image.open(str(path).replace("_image", "_mask")))
        Image.fromarray(2 * (mask > 0).astype(np.uint8)).save(
            tmp_path / path.name.replace("_image", "_mask")
        )
    bent = settings(
        "segment", f"data.image_dir={tmp_path}", "objective.classes=3", "data.elastic=3"
    )
    _, batches, _ = UNetTask.build(bent, Accelerator(cpu=True))
    ((batch, _),) = batches(0)
    assert batch["pixels"][:, -1].unique().tolist() == [0, 2]


def test_a_rows_changes_depend_on_its_own_draws_alone():
    x, every = pixels(4, 1, 16, 16), ImagesConfig(random_flip=True, random_rotate=True, elastic=2.0)
    assert torch.equal(
        augment(x[2:3], every, SampleRng(0, 0, [2])), augment(x, every, draws(4))[2:3]
    )


def test_elastic_moves_the_middle_by_the_middle_vector_of_its_grid():
    """A ramp's value tells where a pixel was taken from."""
    ramp = 12 * torch.arange(17.0) + 20
    both = (
        torch.stack([ramp.expand(17, 17), ramp[:, None].expand(17, 17)])
        .byte()
        .expand(30, 2, 17, 17)
    )
    bent = augment(both, ImagesConfig(elastic=1.5), draws(30))
    moved = (bent - both.float())[:, :, 8, 8] / 12
    vectors = 1.5 * draws(30).normal((30, 2, 3, 3))[:, :, 1, 1]
    torch.testing.assert_close(moved, vectors, rtol=0, atol=0.05)


def test_crops_are_windows_of_the_picture_and_its_target_and_reach_everywhere():
    """Channels hold the row and the column of each pixel."""
    grid = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(30), indexing="ij")).byte()
    images = ImageSet([ImageSample(Picture("", bytes, ""))], lambda sample: grid, True, "cpu")
    batches = ImageBatches(images, PairsConfig(crop=True, resolution=16), BatchSlice(0, 200))
    ((batch, _),) = batches(0)
    rows, columns = batch["pixels"].int().unbind(1)
    assert torch.equal(rows, rows[:, :1, :1] + torch.arange(16)[:, None].expand(200, 16, 16))
    assert torch.equal(columns, columns[:, :1, :1] + torch.arange(16).expand(200, 16, 16))
    assert set(rows[:, 0, 0].tolist()) == set(range(25))
    assert set(columns[:, 0, 0].tolist()) == set(range(15))


@pytest.mark.parametrize("size", [(5, 9), (16, 16), (1, 3), (30, 4)])
def test_mirroring_equals_numpys(size):
    x = pixels(1, 2, *size)
    down, right = (max(0, 16 - side) for side in size)
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, down), (0, right)], mode="symmetric")
    assert np.array_equal(mirror_pad(x, 16, 16), expected)


# Pictures of any size

SIZES = [(16, 16), (16, 40), (5, 9), (33, 47), (50, 17), (8, 60)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_what_looks_at_one_pixel_give_the_whole(size):
    x = random(2, 3, *size)
    torch.testing.assert_close(predict_tiled(nn.Identity(), x, 16), x)
    mixing = nn.Conv2d(3, 5, 1)
    torch.testing.assert_close(predict_tiled(mixing, x, 16), mixing(x))


@pytest.mark.parametrize("size", [(16, 40), (33, 47), (50, 17)])
def test_tiles_of_what_looks_at_neighbours_give_the_whole_but_at_their_edges(size):
    x, blur = random(1, 2, *size), nn.Conv2d(2, 3, 3, padding=1)
    inner = [torch.ones(side, dtype=torch.bool) for side in size]
    for kept, side in zip(inner, size, strict=True):
        for top in tile_offsets(side, 16):
            for edge in {top, top + 15} - {0, side - 1}:
                kept[edge] = False
    at = inner[0][:, None] & inner[1]
    assert at.float().mean() > 0.5
    torch.testing.assert_close(predict_tiled(blur, x, 16)[..., at], blur(x)[..., at])


def test_a_tile_counts_the_more_the_nearer_its_middle():
    answers = iter([1.0, 0.0])
    row = predict_tiled(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 16, 24), 16)[
        0, 0
    ]
    assert (row == row[:1]).all()
    assert (row[0, :8] == 1).all()
    assert (row[0, 16:] == 0).all()
    assert (row[0, 7:17].diff() < 0).all()
    torch.testing.assert_close(row[0] + row[0].flip(0), torch.ones(24))


def test_tiles_cover_everything_half_a_tile_apart():
    for length in range(16, 80):
        starts = tile_offsets(length, 16)
        assert starts[0] == 0
        assert starts[-1] == length - 16
        assert all(0 < b - a <= 8 for a, b in pairwise(starts))


# Losses

VARIANTS = {
    "segment": ("segment", "objective.classes=3"),
    "colorize": ("colorize",),
    "rebalanced": ("colorize", "objective.rebalanced=true"),
    "pix2pix": ("pix2pix",),
    "restore": ("restore", "objective.downscale=2"),
}


def prepared(config):
    use = USES[config.use](config)
    if config.use == "colorize":
        use.prepare(load_images(config.data, "cpu"))
    return use


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(settings, variant):
    """Or accumulation and several processes would not equal one batch."""
    use = prepared(settings(*variant))
    channels = {"segment": 4, "pix2pix": 6}.get(variant[0], 3)
    batch = pixels(4, channels, 16, 16)
    batch[:2, :3] //= 8  # dark, and so of other colours
    if variant[0] == "segment":
        batch[:, 3] %= 3
        batch[0, 3, :9] = 255
    _, y = use.pair(batch, draws(4))
    prediction = torch.randn(4, use.out_channels, 16, 16, generator=torch.manual_seed(0))
    halves = (use.loss(prediction[part], y[part]) for part in (slice(2), slice(2, 4)))
    torch.testing.assert_close(sum(halves) / 2, use.loss(prediction, y))


def test_the_loss_of_masks_is_cross_entropy_and_dice_of_what_is_known(settings):
    use = USES["segment"](settings("segment", "objective.classes=3", "objective.dice_weight=0.7"))
    y = torch.randint(3, (2, 16, 16), generator=torch.manual_seed(0))
    y[0, :5] = 255
    prediction = torch.randn(2, 3, 16, 16)
    share, known, dice = prediction.softmax(1), y != 255, []
    for i in range(2):
        for k in range(3):
            truth, ours = (y[i] == k)[known[i]].float(), share[i, k][known[i]]
            dice.append((2 * (truth * ours).sum() + 1) / (truth.sum() + ours.sum() + 1))
    entropy = sum(
        F.cross_entropy(prediction[i : i + 1], y[i : i + 1], ignore_index=255) for i in range(2)
    )
    expected = entropy / 2 + 0.7 * (1 - sum(dice) / len(dice))
    torch.testing.assert_close(use.loss(prediction, y), expected)


def test_what_is_to_be_ignored_changes_neither_loss_nor_gradient(settings):
    use = USES["segment"](settings("segment"))
    y = torch.randint(2, (2, 16, 16), generator=torch.manual_seed(0))
    y[:, 4:9] = 255
    prediction = torch.randn(2, 2, 16, 16, requires_grad=True)
    loss = use.loss(prediction, y)
    loss.backward()
    other = torch.where((y == 255)[:, None], torch.randn(2, 2, 16, 16), prediction)
    torch.testing.assert_close(use.loss(other, y), loss)
    assert (prediction.grad[:, :, 4:9] == 0).all()
    assert (prediction.grad[:, :, :4] != 0).all()
    assert torch.isfinite(use.loss(prediction, torch.full_like(y, 255)))


def test_a_perfect_mask_costs_nothing(settings):
    use = USES["segment"](settings("segment", "objective.classes=3"))
    y = torch.randint(3, (2, 16, 16), generator=torch.manual_seed(0))
    sure = 50.0 * F.one_hot(y, 3).movedim(3, 1)
    y[:, :2] = 255
    assert float(use.loss(sure, y)) == pytest.approx(0, abs=1e-5)
    assert torch.equal(use.postprocess(sure)[:, 2:], y[:, 2:])


def test_the_losses_of_pix2pix_are_its_papers(settings):
    """Both are told what is shown, the generator has noise too, and it faces the discriminator that
    has stepped."""
    task, batches, _ = UNetTask.build(
        settings("pix2pix", "objective.l1_weight=7"), Accelerator(cpu=True)
    )
    unet, critic = (task.players[name].module for name in ("unet", "discriminator"))
    (batch, rng), *_ = batches(0)
    x, y = (batch["pixels"] / 127.5 - 1).split(3, 1)
    generated = unet(torch.cat([x, SampleRng(0, 0, rng.rows).normal((4, 1, 16, 16))], 1))

    def score(picture):
        return critic(torch.cat([x, picture], 1))

    references = {
        "discriminator": lambda: (
            -F.logsigmoid(score(y)).mean() - F.logsigmoid(-score(generated)).mean()
        ),
        "unet": lambda: 7 * F.l1_loss(generated, y) - F.logsigmoid(score(generated)).mean(),
    }
    check_each_players_step(task, task.losses(batch, rng), references, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad for p in critic.parameters())


# Colours

KNOWN = {  # sRGB to CIE Lab under D65
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (255, 255, 255): (100, 0, 0),
    (0, 0, 0): (0, 0, 0),
}


@pytest.mark.parametrize(("rgb", "expected"), KNOWN.items())
def test_lab_has_the_known_values(rgb, expected):
    value = rgb_pixels_to_lab(torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None]).flatten()
    torch.testing.assert_close(
        value, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.05
    )


@pytest.fixture
def colorize(settings):
    return USES["colorize"](settings("colorize"))


def test_true_colours_give_back_the_picture(colorize):
    picture = pixels(2, 3, 32, 32)
    x, y = colorize.pair(picture, draws(2))
    assert x.shape == (2, 1, 32, 32)
    assert y.abs().max() <= 1
    torch.testing.assert_close(colorize.to_input(picture), x)
    torch.testing.assert_close(colorize.to_image(x, y), picture / 127.5 - 1, rtol=0, atol=1.5 / 255)
    gray = colorize.to_image(x, 0 * y)
    torch.testing.assert_close(gray, gray[:, :1].expand_as(gray), rtol=0, atol=0.01)


def test_colors_that_no_screen_shows_keep_lightness_and_hue_and_lose_only_the_chroma_they_must(
    colorize,
):
    x, y = 1.98 * random(2, 1, 40, 40) - 0.99, 3 * random(2, 2, 40, 40, seed=1) - 1.5
    picture = colorize.to_image(x, y)
    assert picture.abs().max() <= 1
    light, shown = rgb_to_lab((picture + 1) / 2).split([1, 2], 1)
    torch.testing.assert_close(light, 50 * (x + 1), rtol=0, atol=0.5)
    asked = AB_SCALE * y
    scale = (shown * asked).sum(1) / asked.square().sum(1)
    torch.testing.assert_close(shown, scale[:, None] * asked, rtol=0, atol=2)
    assert scale.max() < 1.02
    more = lab_to_rgb(torch.cat([50 * (x + 1), (scale[:, None] + 3 / 256) * asked], 1), clip=False)
    outside = (more < -1e-3).any(1) | (more > 1 + 1e-3).any(1)
    assert outside[scale < 0.9].float().mean() > 0.99


def test_every_colour_is_near_a_bin():
    flat = rgb_pixels_to_lab(pixels(1, 3, 60, 60))[:, 1:]
    chosen = nearest_bin(flat / AB_SCALE)
    distance = torch.cdist(flat.flatten(2)[0].T, ab_bins())
    assert torch.equal(chosen.flatten(), distance.argmin(1))
    assert distance.min(1).values.max() <= 10 / 2**0.5 + 0.1
    assert (ab_bins() % 10 == 0).all()
    assert len(ab_bins().unique(dim=0)) == len(ab_bins())


def test_rare_colours_weigh_more_and_all_together_one(settings):
    final = settings("colorize", "objective.rebalanced=true")
    use, train = prepared(final), load_images(final.data, "cpu")
    colors = torch.cat(
        [
            nearest_bin(rgb_pixels_to_lab(train.take([i]))[:, 1:] / AB_SCALE).flatten()
            for i in range(len(train))
        ]
    )
    p = colors.bincount(minlength=len(ab_bins())) / len(colors)
    assert float((p * use.bin_weights).sum()) == pytest.approx(1, abs=1e-4)
    order = p.argsort()
    assert (use.bin_weights[order].diff() <= 1e-6).all()
    ratio = use.bin_weights / use.bin_weights.max()
    expected = 1 / (0.5 * p + 0.5 / len(p))  # equation 4 of the paper, lambda = 1/2
    torch.testing.assert_close(ratio, expected / expected.max())


def test_a_sure_choice_of_a_bin_is_its_colour_and_a_doubtful_one_the_annealed_mean(settings):
    use = USES["colorize"](settings("colorize", "objective.rebalanced=true"))
    sure = torch.full((1, len(ab_bins()), 1, 1), -50.0)
    sure[0, 7] = 50
    torch.testing.assert_close(use.postprocess(sure).flatten() * AB_SCALE, ab_bins()[7])
    share = random(len(ab_bins())).softmax(0)
    annealed = share.log().div(0.38).exp()
    expected = (annealed / annealed.sum()) @ ab_bins()
    torch.testing.assert_close(
        use.postprocess(share.log()[None, :, None, None]).flatten() * AB_SCALE, expected
    )


# Restoring


@pytest.mark.parametrize(
    "overrides", [("objective.noise=0.2",), ("objective.downscale=2", "objective.noise=0.05")]
)
def test_what_is_added_to_what_is_shown_gives_the_true_picture(settings, overrides):
    use, picture = USES["restore"](settings("restore", *overrides)), pixels(2, 3, 16, 16)
    x, y = use.pair(picture, draws(2))
    assert x.abs().max() <= 1
    torch.testing.assert_close(use.to_image(x, y), picture / 127.5 - 1)


def test_a_noisy_picture_has_the_noise_that_was_asked_for(settings):
    use = USES["restore"](settings("restore", "objective.noise=0.1"))
    gray = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    x, _ = use.pair(gray, draws(4))
    assert float((x / 2).std()) == pytest.approx(0.1, rel=0.03)
    assert torch.equal(use.to_input(gray), gray / 127.5 - 1)


def test_a_small_picture_is_shown_as_in_training(settings):
    """Training pictures are made small and enlarged again; a user's is small already."""
    use = USES["restore"](settings("restore", "objective.downscale=2", "objective.noise=0"))
    picture = F.interpolate(pixels(1, 3, 6, 6).float(), (24, 24), mode="bilinear").byte()
    x, _ = use.pair(picture, draws(1))
    small = F.interpolate(
        picture / 127.5 - 1, scale_factor=0.5, mode="bicubic", antialias=True
    ).clamp(-1, 1)
    shown = use.to_input(((small + 1) * 127.5).round().byte())
    assert shown.shape == x.shape
    torch.testing.assert_close(shown, x, rtol=0, atol=0.02)


# Figures


def test_dice_and_iou_equal_sklearns():
    truth, generated = (
        torch.randint(4, (3, 20, 20), generator=torch.manual_seed(seed)) for seed in (0, 1)
    )
    generated = torch.where(random(3, 20, 20) < 0.6, truth, generated)
    known = random(3, 20, 20, seed=2) < 0.8
    metrics = confusion_metrics(generated, truth.where(known, 255), 4, 255)
    a, b = truth[known].numpy(), generated[known].numpy()
    for k, (f1, iou) in enumerate(
        zip(f1_score(a, b, average=None), jaccard_score(a, b, average=None), strict=True)
    ):
        assert metrics[f"dice_{k}"] == pytest.approx(f1)
        assert metrics[f"iou_{k}"] == pytest.approx(iou)
    assert metrics["pixel_error"] == pytest.approx((a != b).mean())


def test_a_perfect_model_measures_one_even_where_a_picture_lacks_a_class(settings, blobs, tmp_path):
    """Pictures of several sizes are measured one by one."""
    folder = shutil.copytree(blobs, tmp_path / "some")
    size = Image.open(folder / "0_mask.png").size
    Image.new("L", size).save(folder / "0_mask.png")
    final = settings("segment", f"data.image_dir={folder}", "data.crop=true")
    task, _, _ = UNetTask.build(final, Accelerator(cpu=True))
    truth = [task.test_images.take([i])[:, 3].long() for i in range(len(task.test_images))]
    task.predict = lambda images, rows: (None, *2 * [truth[rows[0]] // 255])
    assert min(int(y.max()) for y in truth) == 0
    assert task.evaluate() == {"dice_0": 1, "dice_1": 1, "iou_0": 1, "iou_1": 1, "pixel_error": 0}


def test_psnr_and_ssim_equal_their_closed_forms():
    """Of pictures of one value each, ssim is the comparison of luminance alone, in 0..1."""
    generated, true = torch.full((2, 1, 16, 16), 0.3), torch.full((2, 1, 16, 16), -0.1)
    assert psnr(generated, true) == pytest.approx(10 * math.log10(2**2 / 0.4**2), rel=1e-5)
    c, bright, dark = 0.01**2, 0.65, 0.45
    assert ssim(generated, true) == pytest.approx(
        (2 * bright * dark + c) / (bright**2 + dark**2 + c), rel=1e-4
    )
    x, y = 2 * random(2, 3, 16, 16) - 1, 2 * random(2, 3, 16, 16, seed=1) - 1
    assert psnr(x, y) == pytest.approx(10 * math.log10(4 / np.mean((x - y).numpy() ** 2)), rel=1e-5)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, y) < 0.5


def test_colourfulness_is_hasler_and_suesstrunks():
    assert colorfulness(random(2, 1, 8, 8).expand(2, 3, 8, 8)) == pytest.approx(0, abs=1e-4)
    picture = torch.full((1, 3, 8, 8), -1.0)  # the left half red, the right half blue
    picture[:, 0, :, :4] = picture[:, 2, :, 4:] = 1
    rg, yb = np.array([255.0, 0] * 32), np.array([127.5, -255] * 32)
    expected = np.hypot(rg.std(ddof=1), yb.std(ddof=1)) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert colorfulness(picture) == pytest.approx(expected, rel=1e-5)


def test_a_blurred_picture_is_less_sharp_and_the_true_one_has_sharpness_one():
    x = 2 * random(2, 3, 16, 16) - 1
    assert sharpness(x, x) == pytest.approx(1)
    assert sharpness(F.avg_pool2d(x, 3, 1, 1), x) < 0.5
    assert sharpness(x / 2, x) == pytest.approx(0.5)


# Masks and pairs that cannot be used


def picture_of(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return Picture("some/mask.png", buffer.getvalue, "")


CLASSES = np.random.default_rng(0).integers(0, 2, (6, 7))
ACCEPTED = {
    "0 and 1": Image.fromarray(CLASSES.astype(np.uint8)),
    "0 and 255": Image.fromarray((255 * CLASSES).astype(np.uint8)),
    "one bit": Image.fromarray(CLASSES.astype(bool)),
    "three equal channels": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("RGB"),
    "opaque in colour": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("RGBA"),
    "opaque in grey": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("LA"),
    "sixteen bits": Image.fromarray(CLASSES.astype(np.uint16)),
}


@pytest.mark.parametrize("image", ACCEPTED.values(), ids=ACCEPTED)
def test_every_usual_kind_of_mask_is_read(image):
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 2)), CLASSES)


def test_a_mask_with_a_palette_holds_indices():
    indices = np.random.default_rng(0).integers(0, 3, (6, 7)).astype(np.uint8)
    image = Image.new("P", (7, 6))
    image.putdata(indices.flatten().tolist())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 3)), indices)


def test_classes_and_what_is_to_be_ignored_keep_their_numbers_when_resized():
    array = np.random.default_rng(0).choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
    mask = read_mask(picture_of(Image.fromarray(array)), 3)
    assert np.array_equal(np.asarray(mask), array)
    resized = np.asarray(mask.resize((16, 16), Image.Resampling.LANCZOS))
    assert set(np.unique(resized)) <= {0, 1, 2, 255}


REFUSED = {
    "other values": (Image.fromarray(np.array([[0, 128, 7]], np.uint8)), "has the values 7, 128"),
    "a class too many": (Image.fromarray(np.array([[0, 1, 2]], np.uint8)), "has the values 2"),
    "sixteen bits": (Image.fromarray(np.array([[0, 700]], np.uint16)), "has the values 700"),
    "colour": (Image.new("RGB", (3, 3), "red"), "is in colour"),
}


@pytest.mark.parametrize(("image", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_mask_is_refused_by_name(image, message):
    with pytest.raises(UserError, match=rf"^some/mask.png {message}"):
        read_mask(picture_of(image), 2)


def test_a_mask_that_jpeg_spoilt_is_refused_with_advice():
    with pytest.raises(UserError, match="JPEG spoils masks"):
        read_mask(
            picture_of(
                Image.fromarray((255 * np.kron(CLASSES, np.ones((5, 5)))).astype(np.uint8)), "JPEG"
            ),
            2,
        )


def break_mask(folder):
    (folder / "3_mask.png").write_bytes(b"no picture")
    return r"3_mask.png is not a readable mask"


def break_picture(folder):
    (folder / "3_image.png").write_bytes(b"no picture")
    return r"3_image.png is not a readable picture"


def shrink_mask(folder):
    Image.new("L", (5, 6)).save(folder / "3_mask.png")
    return r"3_image.png and .*3_mask.png are not of one size: 25 x 23 and 5 x 6"


def lose_mask(folder):
    (folder / "3_mask.png").unlink()
    return r"1 pictures have no partner, such as '3': there is no 3_mask"


def lose_picture(folder):
    (folder / "3_image.png").unlink()
    return r"1 pictures have no partner, such as '3': there is no 3_image"


def lose_everything(folder):
    for path in folder.iterdir():
        path.unlink()
    return "there is no picture"


DAMAGES = [break_mask, break_picture, shrink_mask, lose_mask, lose_picture, lose_everything]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("crop", [False, True])
def test_pairs_that_do_not_fit_are_named_before_training(settings, blobs, tmp_path, damage, crop):
    folder = shutil.copytree(blobs, tmp_path / "damaged")
    message = damage(folder)
    with pytest.raises(UserError, match=message):
        run(settings("segment", f"data.image_dir={folder}", f"data.crop={crop}", "data.folds=null"))


def test_a_grey_picture_teaches_no_colours(settings, coloured, tmp_path):
    folder = shutil.copytree(coloured, tmp_path / "some")
    Image.new("L", (20, 20)).save(folder / "grey.png")
    with pytest.raises(UserError, match=r"grey.png is grey"):
        run(settings("colorize", f"data.image_dir={folder}", "data.folds=null"))


def test_grey_pictures_that_are_stored_in_colour_are_warned_of_and_refused_where_all_are(
    settings, coloured, tmp_path
):
    folder = shutil.copytree(coloured, tmp_path / "some")
    Image.new("RGB", (20, 20), (90, 90, 90)).save(folder / "0_image.png")
    source = [f"data.image_dir={folder}", "data.folds=null"]
    with pytest.warns(UserWarning, match=r"1 of 8 pictures .* have none, such as .*0_image.png"):
        UNetTask.build(settings("colorize", *source), Accelerator(cpu=True))
    for path in folder.iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    with pytest.raises(UserError, match=r"8 of 8 pictures .* there is no colour to learn"):
        UNetTask.build(settings("colorize", *source), Accelerator(cpu=True))


def test_an_empty_split_is_named(settings, bars, tmp_path):
    rows = datasets.Dataset.from_parquet(str(bars / "train.parquet")).select([])
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"empty/{split}.parquet")
    source = ("data.image_dir=null", "data.folds=null", f"data.dataset_name={tmp_path}/empty")
    with pytest.raises(UserError, match="split 'train'"):
        run(settings("restore", *source))


def test_the_script_tells_a_users_mistake_in_a_line_and_ends_with_2(settings, blobs, tmp_path):
    folder = shutil.copytree(blobs, tmp_path / "damaged")
    message = lose_mask(folder)
    (tmp_path / "damaged.yaml").write_text(
        loading.dump_config(settings("segment", f"data.image_dir={folder}"))
    )
    process = start("train.py", tmp_path / "damaged.yaml", log=tmp_path / "log")
    process.join()
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 2
    assert message.replace("\\", "") in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("use", "overrides", "message"),
    [
        ("segment", ["data.resolution=15"], "data.resolution: must be a multiple of 2"),
        (
            "segment",
            ["data.resolution=20", "model.patch_size=4"],
            "data.resolution: must be a multiple of 8",
        ),
        ("colorize", ["data.channels=1"], "data.channels: colorize requires color pictures"),
        ("restore", ["objective.classes=3"], "objective.classes: has no effect with restore"),
        ("segment", ["data.image_suffix=_mask"], "data.target_suffix"),
        (
            "segment",
            ["data.image_dir=null", "data.dataset_name=x"],
            "data.target_column: segment requires the column",
        ),
    ],
)
def test_mistakes_in_the_config_are_named(settings, use, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(use, *overrides)


# Whole runs


def figures(final):
    run(final)
    return json.loads((final.output_dir / "figures.json").read_text())


def test_segment_finds_blobs(settings):
    assert figures(settings("segment", "data.channels=1", "data.random_flip=true"))["dice_1"] > 0.8


def test_pix2pix_learns_to_swap_colours_better_than_to_copy_or_to_guess_one_colour(settings):
    final = settings("pix2pix", "objective.l1_weight=100")
    reached = figures(final)["psnr"]
    x, y = (load_images(final.data, "cpu", True, Picture.decode).take(range(2)) / 127.5 - 1).split(
        3, 1
    )
    assert reached > 3 + max(psnr(x, y), psnr(y.mean((0, 2, 3), keepdim=True).expand_as(y), y))


@pytest.mark.parametrize("rebalanced", [False, True])
def test_colorize_comes_nearer_than_grey(settings, rebalanced):
    reached = figures(settings("colorize", f"objective.rebalanced={rebalanced}"))
    assert reached["psnr"] > reached["psnr_grey"] + 1
    assert reached["colourfulness"] > reached["colourfulness_true"] / 3


def test_restore_comes_nearer_than_what_it_is_shown(settings):
    reached = figures(settings("restore", "objective.noise=0.2"))
    assert reached["psnr"] > reached["psnr_shown"] + 1


def test_a_picture_has_the_longest_ending_that_fits_and_no_double(settings, tmp_path):
    for name in ("a", "a_mask", "b", "b_mask"):
        Image.new("L", (16, 16)).save(tmp_path / f"{name}.png")
    final = settings("segment", f"data.image_dir={tmp_path}", "data.image_suffix=''")
    pairs = [
        (Path(s.picture.name).name, Path(s.target.name).name)
        for s in samples_from_pairs(final.data)
    ]
    assert pairs == [("a.png", "a_mask.png"), ("b.png", "b_mask.png")]
    Image.new("L", (16, 16)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have one name"):
        samples_from_pairs(final.data)


def test_the_loss_of_bins_is_cross_entropy_times_the_weight_of_the_true_one(settings):
    use = prepared(settings("colorize", "objective.rebalanced=true"))
    _, y = use.pair(pixels(4, 3, 16, 16), draws(4))
    prediction, true = torch.randn(4, use.out_channels, 16, 16), nearest_bin(y)
    share = prediction.log_softmax(1).gather(1, true[:, None])[:, 0]
    torch.testing.assert_close(use.loss(prediction, y), -(use.bin_weights[true] * share).mean())
