"""Any text and any state of a run is shown in its report, and no text becomes markup."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.shared.processes import call
from tests.shared.reports import Page, check_curves, line, pictures
from trainers.errors import UserError
from trainers.publishing.markdown import markdown_table
from trainers.publishing.report import card_facts, write_report

NASTY = """<b>&amp;"x'</b></title><script>alert(1)</script> {$body}"""
PLACES = ("prompt", "fact", "value", "curve", "figure", "note", "checkpoint", "column")


def test_any_text_is_shown_and_never_becomes_markup(bare):
    at = {place: f"{NASTY}{place}" for place in PLACES}
    metrics = {
        "step": 1,
        f"{at['curve']}_loss": 1,
        "other_loss": 2,
        "images_per_second": 1,
        "peak_memory_gib": 1,
    }
    rows = [{"checkpoint": at["checkpoint"], "step": 1, at["column"]: 0.5}]
    prompts = {"data": {"instance_prompt": at["prompt"]}, "validation": {"prompts": [at["prompt"]]}}
    for name, content in {
        "config.yaml": json.dumps({"kind": "dreambooth", **prompts}),
        "README.md": f"| | |\n|---|---|\n| {at['fact']} | {at['value']} |\n",
        "metrics.jsonl": json.dumps(metrics),
        "figures.json": json.dumps({at["figure"]: at["note"], "<b>": "<b>"}),
        "evaluation.json": json.dumps({"rows": rows, "best": at["checkpoint"]}),
    }.items():
        (bare / name).write_text(content)
    (bare / "samples/final").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(bare / "samples/final/00-0.png")
    page = Page(write_report(bare.rename(bare.with_name("<i>&"))))
    assert [place for place, text in at.items() if text not in page.text] == []
    assert page.text.count(at["prompt"]) == 2  # in the lead and under the picture
    assert page.text.count("<i>&") == 2  # in the title and above
    assert "<b>: <b>" in page.text
    tags = [tag for tag, _ in page.tags]
    counts = {
        "script": 1,
        "title": 1,
        "body": 1,
        "pre": 1,
        "i": 2,
        "b": 5,
    }  # two swatches, five curves' last values
    assert {tag: tags.count(tag) for tag in counts} == counts


def test_facts_of_the_card_are_shown_as_they_were_before_it_escaped_them():
    facts = {"a_b": "to_q|to_k", "c*": "x | `y` \\", "empty": "<b>"}
    page = HTMLText(card_facts(markdown_table(facts)))
    assert page.cells == [text for pair in facts.items() for text in pair]


class HTMLText(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.cells = []
        self.feed(source)

    def handle_data(self, data):
        self.cells += [data] if data.strip() else []


EVALUATION = {
    "net": "some net",
    "columns": ["subject", "prior_drift"],
    "rows": [
        {"checkpoint": "base", "step": 0, "subject": 0.25, "prior_drift": 0.0},
        {"checkpoint": "step-000020", "step": 20, "subject": 0.75, "prior_drift": 0.125},
        {"checkpoint": "final", "step": 40, "subject": 0.5, "prior_drift": None},
    ],
    "strength": [
        {"scale": 0.5 * i, "subject": 0.1 * i, "prior_drift": 0.3 - 0.1 * i} for i in range(4)
    ],
    "best": "step-000020",
    "suggested_rank": 2,
    "spectrum": {"1": 0.75, "2": 0.99, "3": 1.0},
    "memorisation": [
        {"sample": "a.png", "photo": "private-1.png", "similarity": 0.5},
        {"sample": "b.png", "photo": "private-2.png", "similarity": 0.875, "flagged": True},
    ],
}


def test_an_evaluation_is_shown_as_curves_tables_and_pairs(bare):
    (bare / "evaluation.json").write_text(json.dumps(EVALUATION))
    for i, name in enumerate(["a", "b", "private-1", "private-2"]):
        Image.new("RGB", (8, 8), (60 * i, 0, 9)).save(bare / f"{name}.png")
    own, public = Page(write_report(bare)), Page(write_report(bare, pictures=False))
    parts = dict(re.findall("<h2>(.*?)</h2>(.*?)</section>", own.source, re.DOTALL))
    check_curves(parts["Fidelity"], EVALUATION["rows"], "step")
    check_curves(parts["Strength of the LoRA"], EVALUATION["strength"], "scale")
    share = [{"rank": int(rank), "share": value} for rank, value in EVALUATION["spectrum"].items()]
    check_curves(parts["Share of the update by rank"], share, "rank")
    best = re.search("<tr class=best>(.*?)</tr>", parts["Fidelity"])[1]
    assert re.findall("<td[^>]*>(.*?)</td>", best) == ["step-000020", "20", "0.75", "0.125"]
    assert parts["Fidelity"].count("<tr") == 4
    overview = own.source.split("<h2>")[0]
    for name, value in (("subject", "0.75"), ("prior drift", "0.125"), ("suggested rank", "2")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in overview
    assert "feature network: some net" in overview
    assert "best checkpoint: step-000020" in overview
    assert [p.convert("RGB").getpixel((0, 0))[0] for p in pictures(own.source)] == [
        60,
        180,
        0,
        120,
    ]  # the nearest first
    assert [p.convert("RGB").getpixel((0, 0))[0] for p in pictures(public.source)] == [60, 0]
    assert re.findall("similarity[^<]*", own.source) == [
        "similarity 0.875, a near copy",
        "similarity 0.500",
    ]
    assert "private" not in public.source


def test_a_run_that_has_just_begun_and_one_that_was_killed_show_what_is_there(bare):
    page = Page(write_report(bare))
    assert re.search("0 of 40.*not finished", page.text, re.DOTALL)
    assert "<svg" not in page.source
    (bare / "metrics.jsonl").write_text(line(10) + "\n" + line(20) + "\n" + line(30)[:25])
    for step in (10, 20):
        (bare / f"samples/step-{step:06d}").mkdir(parents=True)
        Image.new("RGB", (40, 40), (step, 0, 0)).save(bare / f"samples/step-{step:06d}/grid.png")
    half = bare / "samples/step-000020/grid.png"
    half.write_bytes(half.read_bytes()[:60])
    (bare / "figures.json").write_text('{"psnr": 2')
    page = Page(write_report(bare))
    assert re.search("20 of 40.*not finished", page.text, re.DOTALL)
    assert re.findall("<figcaption>(step .*?)</figcaption>", page.source) == ["step 10"]
    check_curves(page.source, [json.loads(line(10)), json.loads(line(20))], "step")


def test_the_time_is_that_of_all_pictures_at_their_speeds(bare):
    (bare / "metrics.jsonl").write_text(
        "\n".join([line(10), line(30, images_per_second=0.5), line(40)])
    )
    (bare / "checkpoints/step-000040").mkdir(parents=True)
    (bare / "checkpoints/step-000040/manifest.json").write_text('{"facts": {"global batch": 6}}')
    assert 10 * 6 / 8 + 20 * 6 / 0.5 + 10 * 6 / 8 == 4 * 60 + 15
    assert "<dt>time</dt><dd>0:04:15</dd>" in Page(write_report(bare)).source


@pytest.mark.parametrize("text", [None, "a: [", "- a list", "model: {}", "kind: cooking"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, text, capsys):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    assert call("report.py", tmp_path) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_the_script_prints_where_the_report_is(bare, capsys):
    for options, name in (([], "report.html"), (["--public"], "report_public.html")):
        assert call("report.py", bare, *options) == 0
        assert capsys.readouterr().out.strip() == str(bare / name)
        assert (bare / name).is_file()
