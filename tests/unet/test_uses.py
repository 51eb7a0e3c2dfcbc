"""Colors, noise and scores of the uses of a U-Net."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from kornia.color import lab_to_rgb, rgb_to_lab
from PIL import Image

from tests.shared.unets import draws, pixels, prepared, random
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.uses import USES
from trainers.from_scratch.uses.colorize import AB_SCALE, ab_bins, nearest_bin, rgb_pixels_to_lab
from trainers.unet import UNetTask

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


def test_lab_is_that_of_kornia():
    rgb = pixels(2, 3, 20, 20)
    assert torch.equal(rgb_pixels_to_lab(rgb), rgb_to_lab(rgb.float() / 255))
