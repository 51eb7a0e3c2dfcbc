"""Pictures that are stored in colour and have none teach no colours."""

import shutil

import pytest
from accelerate import Accelerator
from PIL import Image

from trainers.errors import UserError
from trainers.unet import UNetTask


def test_gray_pictures_are_warned_of_and_refused_where_all_are(settings, coloured, tmp_path):
    folder = shutil.copytree(coloured, tmp_path / "some")
    Image.new("RGB", (20, 20), (90, 90, 90)).save(folder / "0_image.png")
    source = [f"data.image_dir={folder}", "data.folds=null"]
    with pytest.warns(UserWarning, match=r"1 of 8 pictures .* have none, such as .*0_image.png"):
        UNetTask.build(settings("colorize", *source), Accelerator(cpu=True))
    for path in folder.iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    with pytest.raises(UserError, match=r"8 of 8 pictures .* there is no colour to learn"):
        UNetTask.build(settings("colorize", *source), Accelerator(cpu=True))
