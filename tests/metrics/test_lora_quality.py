"""How good a LoRA is, in closed forms."""

import math

import pytest
import torch

from tests.shared.feature_networks import MEAN_COLOUR
from trainers.metrics import lora_quality
from trainers.metrics.feature_networks import FeatureNetwork


def unit(*degrees):
    """Vectors of the plane whose cosines are known."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def cosine(degrees):
    return math.cos(math.radians(degrees))


def flat(*colors):
    """Pictures (N, 3, 4, 4) of one colour each."""
    return torch.tensor(colors, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)


def test_cosines_of_known_vectors():
    assert lora_quality.fidelity(unit(0, 90), unit(30)) == pytest.approx(
        (cosine(30) + cosine(60)) / 2
    )
    assert lora_quality.prompt_fidelity(unit(0, 90), unit(30, 100)) == pytest.approx(
        (cosine(30) + cosine(10)) / 2
    )
    assert lora_quality.drift(unit(0, 90), unit(20, 90)) == pytest.approx((1 - cosine(20)) / 2)
    assert lora_quality.drift(unit(0, 90), unit(0, 90)) == 0
    assert lora_quality.diversity(unit(0, 60, 90)) == pytest.approx(
        1 - (cosine(60) + cosine(90) + cosine(30)) / 3
    )
    assert math.isnan(lora_quality.diversity(unit(5)))


def test_a_sample_is_suspicious_when_nearer_than_the_nearest_two_photos():
    index, similarity, flagged = lora_quality.nearest_photos(
        unit(79, 69, 300), unit(0, 80, 100)
    )  # 20 degrees apart
    assert index.tolist() == [1, 1, 0]
    assert similarity.tolist() == pytest.approx([cosine(1), cosine(11), cosine(60)])
    assert flagged.tolist() == [True, True, False]
    assert lora_quality.nearest_photos(unit(59), unit(0, 80, 100))[2].tolist() == [False]
    assert lora_quality.nearest_photos(unit(0, 1), unit(0))[2].tolist() == [False, False]


def test_features_have_unit_length_and_do_not_depend_on_the_batch():
    x = torch.rand(40, 3, 4, 4) * 2 - 1
    seen = MEAN_COLOUR.encode_pictures(x)
    assert torch.allclose(seen.norm(dim=1), torch.ones(40))
    assert torch.allclose(seen[35:], MEAN_COLOUR.encode_pictures(x[35:]))


def test_a_row_measures_each_figure_on_its_own_pictures():
    red, green, blue = ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))
    colors = {"red": red, "green": green, "blue": blue}
    plain = FeatureNetwork("plain", lambda x: x.mean((2, 3)))
    clip = FeatureNetwork(
        "clip",
        lambda x: x.mean((2, 3)) + 1,
        lambda p: torch.tensor([colors[word] for word in p]) + 1,
    )
    generated = {
        "subject": flat(red, red, green, green),
        "class": flat(red, blue),
        "prompt-0": flat(blue, blue),
    }
    base = {
        "subject": flat(blue, blue, blue, blue),
        "class": flat(red, green),
        "prompt-0": flat(blue, blue),
    }
    prompts = {"subject": ["red"] * 4, "class": ["?"] * 2, "prompt-0": ["blue"] * 2}
    row = lora_quality.lora_metrics([plain, clip], generated, base, flat(red, red, blue), prompts)
    assert row == {
        "subject": pytest.approx(1 / 3),  # 2 of 4 samples equal 2 of 3 photos
        "prior_drift": pytest.approx(1 / 2),  # one of two has turned by a right angle
        "pixel_drift": pytest.approx(
            1 / 6
        ),  # of that one, in two of three channels, half of the range
        "diversity": pytest.approx(
            (4 / 6 + 0) / 2
        ),  # 4 of 6 pairs of "subject" differ, none of "prompt-0"
        "clip_i": pytest.approx((4 * 1 + 8 * 5 / 6) / 12),  # two colours have the cosine 5 / 6
        "clip_t": pytest.approx((4 * 1 + 2 * 5 / 6) / 6),
    }
    row = lora_quality.lora_metrics(
        [plain], {"subject": generated["subject"]}, base, flat(red), prompts
    )
    assert row == {
        "subject": 0.5,
        "prior_drift": None,
        "pixel_drift": None,
        "diversity": pytest.approx(4 / 6),
    }
    assert "clip_i" not in lora_quality.lora_metrics([clip], generated, base, flat(red), prompts)


def test_the_best_is_near_the_subject_and_has_not_drifted():
    rows = [(0.5, 0.1), (0.8, 0.2), (0.9, 0.4), (0.7, 0.1)]
    rows = [{"checkpoint": str(i), "subject": s, "prior_drift": d} for i, (s, d) in enumerate(rows)]
    assert lora_quality.best_row(rows)["checkpoint"] == "1"  # .6, as "3", which is later
    assert lora_quality.best_row([row | {"prior_drift": None} for row in rows])["checkpoint"] == "2"
