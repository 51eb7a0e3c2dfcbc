"""The page of a run while it trains: its state, its news, and what it costs."""

import json
import re
import signal
from collections import deque
from itertools import pairwise

import pytest
from PIL import Image

from tests.shared.reports import Page, line, pictures
from trainers.config import Config
from trainers.config.base_sections import TrackingConfig, TrainConfig, ValidationConfig
from trainers.errors import Interrupted, UserError
from trainers.publishing import live
from trainers.publishing.live import LiveReport
from trainers.publishing.report import write_report
from trainers.run import run
from trainers.training import callbacks
from trainers.training.status import RUNNING, new_status, read_status, write_status


@pytest.fixture
def written(monkeypatch):
    """The state and the page of each time a run writes them, with no rest between two."""
    seen = []

    def note(folder, config):
        page = write_report(folder, config=config).read_text("utf-8")
        seen.append((json.loads((folder / "status.json").read_text()), page))

    monkeypatch.setattr(live, "write_report", note)
    monkeypatch.setattr(live, "PAGE_SECONDS", 0.0)
    monkeypatch.setattr(live, "COST_FACTOR", 0.0)
    return seen


def test_a_run_shows_itself_from_the_first_step_to_its_end(settings, written):
    config = settings(
        "train.max_train_steps=2", "validation.prompts=[a b]", "validation.validation_steps=50"
    )
    run(config)
    states = [(status["state"], status["step"]) for status, _ in written]
    assert states == [("running", 0), ("running", 1), ("running", 2), ("finished", 2)]
    for status, page in written[:-1]:
        assert "location.reload()" in page
        assert '<noscript><meta http-equiv="refresh"' in page
        assert f"step {status['step']} of 2" in page
        assert '<figure class="base"><figcaption>step 0</figcaption>' in page
        assert "Training pictures" not in page
    assert [status["seconds_left"] is None for status, _ in written] == [True, False, False, True]
    last = written[-1][1]
    assert "reload()" not in last
    assert "http-equiv=&#34;refresh" not in last
    assert 'class="state finished"' in last
    assert "Training pictures" in last
    assert (config.output_dir / "samples/step-000000/grid.png").is_file()


def test_what_was_there_before_is_sampled_once_and_not_again_after_a_stop(settings, monkeypatch):
    changes = ("validation.prompts=[a b]", "validation.validation_steps=50")
    run(settings("train.max_train_steps=2", *changes))
    grid = settings().output_dir / "samples/step-000000/grid.png"
    grid.unlink()
    run(settings("train.max_train_steps=3", *changes))
    assert not grid.exists()


def stop_by_signal(*_):
    signal.raise_signal(signal.SIGTERM)


def fail(*_):
    raise ValueError("a <b>strange</b> thing")


def be_mistaken(*_):
    raise UserError("mend this")


@pytest.mark.parametrize(
    ("event", "state", "message"),
    [
        (stop_by_signal, "stopped", "goes on from the checkpoint step-000001"),
        (fail, "failed", "ValueError: a <b>strange</b> thing"),
        (be_mistaken, "failed", "mend this"),
    ],
)
def test_a_page_tells_how_a_run_ended(settings, monkeypatch, event, state, message):
    config = settings("train.max_train_steps=2")
    monkeypatch.setattr(callbacks.SamplePictures, "__call__", event)
    with pytest.raises((Interrupted, ValueError, UserError)):
        run(config)
    page = Page(config.output_dir / "report.html")
    assert f'class="state {state}"' in page.source
    assert message in page.text
    assert "reload()" not in page.source
    assert read_status(config.output_dir).state == state


def test_pages_take_less_than_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """Whatever a page costs; and there are never two within ten seconds."""
    for cost in (0.001, 0.05, 2.0):
        now, pages = [0.0], []

        def write(*_, cost=cost, now=now, pages=pages, **__):
            pages.append(now[0])
            now[0] += cost

        monkeypatch.setattr(live.time, "monotonic", lambda now=now: now[0])
        monkeypatch.setattr(live, "write_report", write)
        report = LiveReport(make_config(tmp_path), True, deque())
        report.start(0)
        for step in range(1, 5001):
            now[0] += 0.2
            report(step, {})
        assert len(pages) > 4
        assert min(b - a for a, b in pairwise(pages)) >= 10
        # beside the first one, which is there from the start
        assert (len(pages) - 1) * cost <= 0.01 * now[0]
        monkeypatch.undo()


def make_config(folder):
    return Config(
        output_dir=folder,
        train=TrainConfig(max_train_steps=5000),
        tracking=TrackingConfig(log_every=10),
        validation=ValidationConfig(validation_steps=100),
    )


def test_only_the_main_process_writes(tmp_path):
    report = LiveReport(make_config(tmp_path), False, deque())
    report.start(0)
    report(10, {})
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_costs_a_warning_and_no_training(tmp_path):
    report = LiveReport(make_config(tmp_path / "gone"), True, deque())
    with pytest.warns(UserWarning, match="the live report failed .*; training goes on"):
        report.start(0)


def test_warnings_and_messages_are_shown_as_text_and_to_the_owner_alone(bare):
    status = new_status(RUNNING, 3, 40)
    nasty = "</script><b>/home/someone/photos"
    write_status(bare, type(status)(**vars(status) | {"warnings": [nasty], "message": nasty}))
    own, public = Page(write_report(bare)), Page(write_report(bare, pictures=False))
    assert own.text.count(nasty) == 2
    assert [tag for tag, _ in own.tags].count("script") == 1
    assert "someone" not in public.source
    assert "reload()" not in public.source
    assert "not finished" in public.text


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"process_started_at": 5.0}, "gone"),
        ({"process": 2**22 + 5}, "gone"),
        ({"host": "elsewhere", "process_started_at": 5.0}, "running"),
    ],
)
def test_a_run_that_was_killed_is_not_called_running(bare, change, state):
    """Another machine's processes cannot be seen from here."""
    write_status(bare, new_status(RUNNING, 3, 40))
    file = bare / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert f'class="state {state}"' in Page(write_report(bare)).source


@pytest.mark.parametrize("text", ["", "null", "{}", '{"state": 1, "step": "x"}', "\x00"])
def test_a_damaged_state_is_as_none(bare, text):
    (bare / "status.json").write_text(text)
    assert read_status(bare) is None
    assert "not finished" in Page(write_report(bare)).text


def test_the_newest_samples_stand_beside_those_of_the_base(bare):
    for step, color in ((0, 10), (20, 90), (40, 200)):
        folder = bare / f"samples/step-{step:06d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (color, 0, 0)).save(folder / "grid.png")
    (bare / "metrics.jsonl").write_text(line(40))
    source = Page(write_report(bare)).source
    base = re.search('<div class="pair">.*?<div class="frames">', source, re.DOTALL)[0]
    assert [p.convert("RGB").getpixel((0, 0))[0] for p in pictures(base)] == [10]
    assert [p.convert("RGB").getpixel((0, 0))[0] for p in pictures(source)] == [10, 90, 200]
