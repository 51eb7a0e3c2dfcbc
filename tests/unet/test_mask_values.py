"""What the values of masks stand for is seen in all masks of a data set."""

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from trainers.config import loading
from trainers.errors import UserError
from trainers.unet import UNetTask


@pytest.fixture
def make(tmp_path):
    """A function: the values of each mask, number of classes -> a task on such masks. Every second
    one is held out."""

    def build(masks, classes=2, *overrides):
        rng = np.random.default_rng(0)
        for i, values in enumerate(masks):
            mask = np.resize(np.array(values, np.uint8), (16, 16))
            Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
            picture = rng.integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"{i}_image.png")
        path = tmp_path / "config.yaml"
        path.write_text(
            f"""
kind: unet
output_dir: {tmp_path}/run
model: {{width: 8, levels: 2}}
data: {{image_dir: {tmp_path}, folds: 2, fold: 1, channels: 1, resolution: 16}}
objective: {{classes: {classes}}}
"""
        )
        return UNetTask(loading.load_config(path, overrides), Accelerator(cpu=True))

    return build


def classes_of(images):
    return [
        sorted(set(pixels[-1].flatten().tolist()))
        for pixels in (images[i] for i in range(len(images)))
    ]


BLACK, WHITE, BOTH = [0], [255], [0, 255]
READ = {
    # values of masks to learn from and held out, number of classes, what they become
    "black and white": ([BOTH, BLACK, BLACK, WHITE], 2, [[0, 1], [0], [0], [1]]),
    "0 and 1": ([[0, 1], [0], [0], [1]], 2, [[0, 1], [0], [0], [1]]),
    "0, 1 and ignore": ([[0, 1], BOTH, BOTH, [0, 1]], 2, [[0, 1], [0, 255], [0, 255], [0, 1]]),
    "0, 1 and ignore in one": ([[0, 1, 255], [1], [0], [0]], 2, [[0, 1, 255], [1], [0], [0]]),
    "three and ignore": ([[0, 1, 2], [2], BOTH, [1]], 3, [[0, 1, 2], [2], [0, 255], [1]]),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("masks", "classes", "expected"), READ.values(), ids=READ)
def test_255_is_a_class_where_all_masks_are_black_and_white_and_else_to_be_ignored(
    make, masks, classes, expected, in_memory
):
    task = make(masks, classes, f"data.in_memory={in_memory}")
    assert classes_of(task.train_images) == expected[::2]
    assert classes_of(task.test_images) == expected[1::2]


@pytest.mark.parametrize(
    ("masks", "classes", "message"),
    [
        ([BOTH, BOTH], 3, r"hold only 0, 255, .* with objective.classes=2 and masks of 0 and 255"),
        ([BLACK, BOTH], 2, r"the training masks hold only 0, which is one class or none"),
        ([WHITE, [0, 1]], 3, r"the training masks hold only 255, which is one class or none"),
        ([[0, 1], WHITE], 3, r"the held-out masks hold only 255, 'ignore'"),
    ],
)
def test_masks_that_teach_or_measure_nothing_are_refused(make, masks, classes, message):
    with pytest.raises(UserError, match=message):
        make(masks, classes)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_a_class_too_many_is_refused_by_name_before_training(make, place, in_memory):
    masks = [[0, 1], [0, 1]]
    masks[place] = [0, 1, 2]
    with pytest.raises(UserError, match=rf"{place}_mask.png has the values 2: .* 0 to 1, and 255"):
        make(masks, 2, f"data.in_memory={in_memory}")


def test_a_class_that_no_training_mask_holds_is_warned_of(make):
    with pytest.warns(UserWarning, match="classes=4, but no training mask holds 1, 3: "):
        make([[0, 2], [0, 1]], 4)
