"""What is shown of a photo: what no crop has is dark, and what no encoder reads is struck out."""

import numpy as np
import pytest

from tests.shared.fake_pictures import fake
from trainers.data.inspection import Box, describe_likeness, find_unseen, read_caption


@pytest.mark.parametrize("num_views", [1, 4, 16])
def test_what_is_darkened_is_what_no_crop_shows(num_views):
    random = np.random.default_rng(num_views)
    corners = random.uniform(0, 0.5, (num_views, 2))
    views = [Box(x, y, *random.uniform(0.1, 0.5, 2)) for x, y in corners]
    unseen = find_unseen(views)
    for x, y in random.uniform(0, 1, (500, 2)):
        shown, dark = (
            sum(box.left < x < box.right and box.top < y < box.bottom for box in boxes)
            for boxes in (views, unseen)
        )
        assert dark == (shown == 0)


class Encoders:
    """Text encoders that read so many characters, and give the rest back in their own way."""

    def __init__(self, **lengths):
        self.lengths, self.text_encoder_names = lengths, list(lengths)

    def count_tokens(self, name, prompt):
        letters, limit = "".join(prompt.split()), self.lengths[name]
        return len(letters), limit, " ".join(letters[limit:].lower())


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ({}, ("A dog, on Grass", "", "")),
        ({"one": 99}, ("A dog, on Grass", "", "")),
        ({"one": 7}, ("A dog, on ", "", "Grass")),
        ({"one": 9, "two": 99}, ("A dog, on Gr", "ass", "")),
        ({"one": 5, "two": 8}, ("A dog, ", "on G", "rass")),
        ({"one": 0}, ("", "", "A dog, on Grass")),
    ],
)
def test_a_caption_is_cut_where_its_encoders_stop_whatever_their_spaces_and_cases(lengths, parts):
    reading = read_caption("A dog, on Grass", Encoders(**lengths) if lengths else None)
    assert reading.parts == parts


def test_a_copy_names_the_concept_of_the_other():
    photos = [fake("0.png", concept=name) for name in ("rex", "tom")]
    assert describe_likeness(photos) == {photos[1]: ["the same as rex: 0.png"]}
