"""What means nothing to a family, or does not fit it, is refused before it trains."""

import pytest

from tests.shared.families import ALL
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.run import run

REFUSED = [
    ("sd15", "objective.shift=2", r"objective\.shift: .*flux, .*sd3"),
    ("sd15", "objective.precondition=true", r"objective\.precondition: .*flux, .*sd3"),
    ("flux", "model.clip_chunks=2", r"model\.clip_chunks: .*sd15, sd3"),
    ("sd15", "model.max_sequence_length=10", r"model\.max_sequence_length: .*flux, .*sd3"),
    ("sd15", "data.resolution=20", r"data\.resolution: .*multiple of 8, not 20"),
    ("sd3", "objective.noise_offset=0.1", r"objective\.noise_offset: .*sd15"),
    ("sd3", "model.guidance_scale=3.5", r"model\.guidance_scale: .*flux"),
    ("sd3", "data.resolution=24", r"data\.resolution: .*multiple of 16, not 24"),
    ("flux", "objective.snr_gamma=5", r"objective\.snr_gamma: .*sd15"),
    ("flux", "model.text_encoder_3=null", r"model\.text_encoder_3: .*sd3"),
    ("flux", "data.resolution=24", r"data\.resolution: .*multiple of 16, not 24"),
]


@pytest.mark.parametrize(
    ("name", "override", "message"), REFUSED, ids=[f"{name} {key}" for name, key, _ in REFUSED]
)
def test_what_means_nothing_to_a_family_is_refused(settings, name, override, message):
    with pytest.raises(UserError, match=message):
        settings(override, family=name)


def test_sizes_that_only_flux_and_sd3_cannot_split_into_patches_are_fine_for_sd15(settings):
    assert settings("data.resolution=24").data.resolution == 24


@pytest.mark.parametrize("name", ALL)
def test_a_base_of_another_family_is_refused(settings, bases, name):
    other = {"sd15": "sdxl", "sdxl": "sd3", "sd3": "flux", "flux": "sd15"}[name]
    wrong = settings(f"model.pretrained_model_name_or_path={bases[other]}", family=name)
    with pytest.raises(UserError, match=FAMILIES[other].pipeline.__name__):
        run(wrong)
