"""A report has every picture of its run once, fetches nothing, and keeps the training pictures to
its owner."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.shared.reports import KINDS, Page, check_curves, contents, levels, pictures
from trainers.data.pictures import list_image_files
from trainers.publishing.report import write_report

pytestmark = pytest.mark.filterwarnings("ignore:the discriminator tells")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_its_curves_pictures_and_settings(runs, kind):
    page = Page(write_report(runs[kind]))
    rows = [json.loads(line) for line in (runs[kind] / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    check_curves(page.source, rows, "step")
    assert (runs[kind] / "config.yaml").read_text().strip() in page.text
    assert "not finished" not in page.text
    card = (runs[kind] / "README.md").read_text()
    assert re.search(r"Versions \| (.*) \|", card)[1] in page.text
    if kind in ("autoencoder", "unet"):
        for name, value in json.loads((runs[kind] / "figures.json").read_text()).items():
            assert re.search(
                rf"\n{name.replace('_', ' ')}\n{value:.4g}".replace("e-0", "e-"), page.text
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_fetches_nothing(runs, kind):
    page = Page(write_report(runs[kind]))
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in (
            "src",
            "srcset",
            "href",
            "poster",
            "data",
            "action",
            "background",
            "xlink:href",
        ):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs[name])
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|https?://", re.sub("<pre>.*?</pre>", "", page.source)
    )
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert not re.search(r"http|\*|'self'", policy)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slider_has_one_frame_for_each_sampled_step(runs, kind):
    page = Page(write_report(runs[kind]))
    assert re.findall("<figcaption>step (\\d+)</figcaption>", page.source) == ["0", "2", "4", "6"]
    (slider,) = [attrs for tag, attrs in page.tags if tag == "input"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    stack = re.search('<div class="stack">.*?</div>', page.source, re.DOTALL)[0]
    grids = [folder / "grid.png" for folder in sorted((runs[kind] / "samples").glob("step-*"))]
    base = re.search('<figure class="base">.*?</figure>', page.source, re.DOTALL)[0]
    (shown,) = pictures(base)
    assert np.abs(levels(shown) - levels(Image.open(grids.pop(0)))).mean() < 8
    for frame, grid in zip(pictures(stack), grids, strict=True):
        assert np.abs(levels(frame) - levels(Image.open(grid))).mean() < 8


def test_final_pictures_stand_at_their_prompts_and_are_the_files(runs):
    page = Page(write_report(runs["dreambooth"], pictures=False))
    files = sorted((runs["dreambooth"] / "samples/final").glob("*-*.png"))
    assert [levels(p).tolist() for p in pictures(page.source)[: len(files)]] == [
        levels(Image.open(f)).tolist() for f in files
    ]
    assert (
        page.text.index("\na b\n") < page.text.index("\nc\n") < page.text.index("Samples over time")
    )


@pytest.mark.parametrize(
    ("kind", "others"), [("dreambooth", 4), ("gan", 1), ("autoencoder", 1), ("unet", 0)]
)
def test_no_picture_is_shown_twice(runs, kind, others, tmp_path):
    """Others than the base and the three frames: the prompts' pictures, the walk, the codes."""
    folder = tmp_path / "run"
    shutil.copytree(runs[kind], folder, ignore=shutil.ignore_patterns("*.safetensors", "cache"))
    assert len(pictures(Page(write_report(folder, pictures=False)).source)) == 4 + others
    Image.new("RGB", (200, 90)).save(folder / "samples/final/grid.png")  # no longer the last frame
    shown = pictures(Page(write_report(folder, pictures=False)).source)
    assert [picture.size for picture in shown].count((200, 90)) == (kind != "dreambooth")


def test_the_walk_still_moves(runs):
    moving = [
        p for p in pictures(Page(write_report(runs["gan"])).source) if getattr(p, "n_frames", 1) > 1
    ]
    with Image.open(runs["gan"] / "samples/final/walk.gif") as film:
        assert [picture.n_frames for picture in moving] == [film.n_frames]
        for frame, true in zip(
            ImageSequence.Iterator(moving[0]), ImageSequence.Iterator(film), strict=True
        ):
            assert np.abs(levels(frame) - levels(true)).mean() < 8
        assert moving[0].info["duration"] == film.info["duration"]


@pytest.mark.parametrize("kind", ["dreambooth", "unet"])
def test_training_pictures_are_in_the_owners_report_alone(runs, photos, blobs, kind):
    folder = {"dreambooth": photos, "unet": blobs}[kind]
    private = {
        (p.size, p.tobytes())
        for p in (Image.open(f).convert("RGB") for f in list_image_files(folder))
    }
    own, public = write_report(runs[kind]), write_report(runs[kind], pictures=False)
    assert (own.name, public.name) == ("report.html", "report_public.html")
    assert private <= contents(Page(own))
    assert not private & contents(Page(public))
    assert ["Training pictures" in Page(path).text for path in (own, public)] == [True, False]


def test_the_owners_report_shows_how_each_photo_was_seen_and_the_public_one_does_not(runs, photos):
    own = write_report(runs["dreambooth"]).read_text("utf-8")
    public = write_report(runs["dreambooth"], pictures=False).read_text("utf-8")
    names = [path.name for path in list_image_files(photos)]
    # 6 steps of 4 rows
    for text in (*names, '<path class="crop"', "“a b”", f"seen {24 / len(names):.3g} times"):
        assert text in own
    for text in (*names, '<figcaption class="name"', str(photos)):
        assert text not in public


def test_pictures_of_a_local_data_set_are_spread_over_it(runs, bars):
    page = Page(write_report(runs["autoencoder"]))
    assert "30 of 120" in page.text
    assert {np.array(p)[:8].any() for p in pictures(page.source)[-30:]} == {
        True,
        False,
    }  # of both classes


def test_at_most_thirty_pictures_are_shown_and_none_twice(bare, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(31):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "many" / f"{i:02d}.png")
    (bare / "config.yaml").write_text(
        "kind: dreambooth\n"
        f"data: {{instance_data_dir: {tmp_path}/many, instance_prompt: a b, resolution: 16}}\n"
    )
    assert len(contents(Page(write_report(bare)))) == 30
    shutil.rmtree(tmp_path / "many")
    assert not pictures(Page(write_report(bare)).source)


def test_a_report_is_written_again_after_the_photos_are_gone(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["dreambooth"], run)
    config = (run / "config.yaml").read_text()
    folder = re.search(r"instance_data_dir: (.*)", config)[1]
    (tmp_path / "empty").mkdir()
    (run / "config.yaml").write_text(config.replace(folder, str(tmp_path / "empty")))
    assert 'class="photos"' not in write_report(run).read_text()
