"""A report shows the numbers of its run, needs nothing from outside, and keeps the training
pictures to itself."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageSequence
from processes import call

from trainers.config import loading
from trainers.data.pictures import list_image_files
from trainers.errors import UserError
from trainers.publishing.charts import line_charts, smooth, ticks
from trainers.publishing.html import display_name
from trainers.publishing.markdown import markdown_table
from trainers.publishing.report import card_facts, write_report
from trainers.run import run

pytestmark = pytest.mark.filterwarnings("ignore:the discriminator tells")
NASTY = """<b>&amp;"x'</b></title><script>alert(1)</script> {$body}"""
PLACES = ("prompt", "fact", "value", "curve", "figure", "note", "checkpoint", "column")
KINDS = {
    "dreambooth": """
model: {{family: sd15, pretrained_model_name_or_path: {sd15}}}
lora: {{rank: 2}}
data: {{instance_data_dir: {photos}, instance_prompt: a b, resolution: 16}}
validation: {{prompts: [a b, c], num_images: 2, validation_steps: 2,
  num_inference_steps: 2, guidance_scale: 2}}
""",
    "gan": """
model: {{latent_dim: 4, width: 8}}
data: {{dataset_name: {bars}, label_column: label, test_split: null, resolution: 28}}
validation: {{validation_steps: 2}}
""",
    "autoencoder": """
model: {{latent_dim: 4, width: 8}}
data: {{dataset_name: {bars}, label_column: label, resolution: 16}}
validation: {{validation_steps: 2}}
""",
    "unet": """
use: segment
model: {{width: 8, levels: 2}}
data: {{image_dir: {blobs}, folds: 4, channels: 3, resolution: 16}}
validation: {{validation_steps: 2}}
""",
}


@pytest.fixture(scope="module")
def runs(bases, photos, bars, blobs, tmp_path_factory):
    """Kind -> the folder of its finished run of six steps."""
    folders = {}
    for kind, text in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        text = text.format(sd15=bases["sd15"], photos=photos, bars=bars, blobs=blobs)
        (folder / "config.yaml").write_text(
            f"kind: {kind}\noutput_dir: {folder}/run\n{text}\n"
            "train: {max_train_steps: 6, train_batch_size: 4}\ntracking: {report_to: [], "
            "log_every: 1}\n"
        )
        run(settings := loading.load_config(folder / "config.yaml"))
        folders[kind] = settings.output_dir
    return folders


@pytest.fixture
def bare(tmp_path):
    """A run folder that holds its config alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.yaml").write_text("kind: dreambooth\ntrain: {max_train_steps: 40}\n")
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data + "\n"


def pictures(source):
    found = re.findall('src="data:image/webp;base64,(.*?)"', source)
    assert len(found) == source.count("<img ")
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def levels(picture):
    return np.asarray(picture.convert("RGB"), float)


def read_back(source):
    """Title -> name -> points (N, 2) of the measured curves, by the labels that a reader sees at
    the axes."""
    found = {}
    for chart in re.findall('<figure class="chart">.*?</figure>', source, re.DOTALL):
        svg, lines = ElementTree.fromstring(re.search("<svg.*?</svg>", chart, re.DOTALL)[0]), {}
        labels = {axis: [t for t in svg.iter("text") if t.get("class") == axis] for axis in "xy"}
        x_axis, y_axis = (
            [(float(t.get(axis)) - middle, float(t.text)) for t in labels[axis]]
            for axis, middle in (("x", 0), ("y", 3.5))
        )
        for line in svg.iter("polyline"):
            if "raw" in line.get("class", ""):
                x, y = np.array([pair.split(",") for pair in line.get("points").split()], float).T
                lines[line.get("data-name")] = np.stack([along(x_axis, x), along(y_axis, y)], 1)
        found[re.search("<h3>(.*?)</h3>", chart)[1]] = lines
    return found


def along(axis, places):
    """The values at places on an axis with labels [(place, value)], equally spaced or powers of
    ten."""
    at, values = np.array(axis).T
    log = (values > 0).all() and np.allclose(
        np.diff(np.log10(values)), np.log10(values[1] / values[0])
    )
    log = log and values[1] >= 10 * values[0]
    slope, start = np.polyfit(at, np.log10(values) if log else values, 1)
    return 10 ** (slope * places + start) if log else slope * places + start


def check_curves(source, rows, x):
    """Each number of the rows is on its curve, up to the width of a line, and nothing else is."""
    shown = {
        (title, name): points
        for title, lines in read_back(source).items()
        for name, points in lines.items()
    }
    wanted = {}
    for row in rows:
        for name, value in row.items():
            if name != x and isinstance(value, (int, float)):
                player = re.fullmatch("(.+)_(loss|grad_norm)", name)
                title = player[2] if player else name
                wanted.setdefault((display_name(title), player[1] if player else name), []).append(
                    (row[x], value)
                )
    assert shown.keys() == wanted.keys()
    for key, points in wanted.items():
        true = np.array(points, float)
        assert shown[key].shape == true.shape
        close = np.abs(shown[key] - true) <= np.maximum(
            0.003 * (np.ptp(true, 0) + 1e-9), 0.01 * np.abs(true)
        )
        assert close.all(), key


SHAPES = {
    "falls over four decades": 10 ** -np.linspace(-1, 3, 60),
    "changes sign": np.sin(np.arange(60)) * 7,
    "one far away": np.r_[np.ones(59), 900],
    "one near zero": np.r_[np.ones(59), 1e-9],
    "constant": np.full(60, 1e-4),
    "zero": np.zeros(60),
    "large": 1e5 + np.arange(60) ** 2.0,
    "with zeros and far away": np.r_[np.zeros(50), np.full(10, 1e4)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_curve_is_read_back_from_its_axes_as_it_was_measured(shape):
    rows = [{"step": 10 * i + 10, "value": float(value)} for i, value in enumerate(SHAPES[shape])]
    check_curves(line_charts(rows, "step"), rows, "step")


def test_a_loss_that_falls_over_four_decades_is_readable_at_its_end():
    ys = SHAPES["falls over four decades"]
    page = line_charts([{"step": i, "value": float(y)} for i, y in enumerate(ys)], "step")
    assert np.allclose(read_back(page)["value"]["value"][:, 1], ys, rtol=0.01)


def test_what_is_logged_less_often_or_is_no_number_is_left_out_where_it_lacks():
    rows = [
        {"step": i, "a_loss": 1.0 + i, "b_loss": 2.0 - i, "order": None if i % 3 else 0.1 * i}
        for i in range(1, 30)
    ]
    rows[7]["a_loss"], rows[7]["note"] = float("nan"), "text"
    page = line_charts(rows, "step")
    del rows[7]["a_loss"]
    check_curves(page, rows, "step")
    assert list(read_back(page)) == ["loss", "order"]
    assert list(read_back(page)["loss"]) == ["a", "b"]


@pytest.mark.parametrize("half", [1, 4])
def test_the_strong_line_is_the_mean_of_as_many_on_both_sides(half):
    ys = np.random.default_rng(0).normal(size=30)
    got = smooth([(float(i), float(y)) for i, y in enumerate(ys)], half)
    assert [x for x, _ in got] == list(range(30))
    inner = np.convolve(ys, np.full(2 * half + 1, 1 / (2 * half + 1)), "valid")
    assert np.allclose([y for _, y in got][half:-half], inner)
    assert [got[0][1], got[1][1]] == pytest.approx([ys[0], ys[:3].mean()])  # a steep start is kept
    assert got[-1][1] == pytest.approx(
        ys[-1 - half :].mean()
    )  # the last is no better known than its neighbours


def test_only_many_points_that_jump_about_are_smoothed():
    noise, steady = np.random.default_rng(0).normal(size=100), np.linspace(0, 1, 100) ** 2
    strong = {}
    for name, ys in {"noise": noise, "steady": steady, "few": noise[:20]}.items():
        page = line_charts([{"step": i, name: float(y)} for i, y in enumerate(ys)], "step")
        lines = re.findall('<polyline class="raw( faint)?"', page)
        strong[name] = (lines, page.count("<polyline"))
    assert strong == {"noise": ([" faint"], 2), "steady": ([""], 1), "few": ([""], 1)}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 800), (1e-9, 3e-9), (5, 5), (0, 0), (-2, -2), (99.9, 100.1)]
)
def test_labels_are_few_equally_spaced_and_hold_all_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-6 * abs(low)
    assert marks[-1] >= high - 1e-6 * abs(high)
    assert 2 <= len(marks) <= 7
    assert np.allclose(np.diff(marks), marks[1] - marks[0])


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
    assert re.findall("<figcaption>step (\\d+)</figcaption>", page.source) == ["2", "4", "6"]
    (slider,) = [attrs for tag, attrs in page.tags if tag == "input"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    stack = re.search('<div class="stack">.*?</div>', page.source, re.DOTALL)[0]
    grids = [folder / "grid.png" for folder in sorted((runs[kind] / "samples").glob("step-*"))]
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
    """Others than the three frames: the prompts' pictures, the walk, the codes."""
    folder = tmp_path / "run"
    shutil.copytree(runs[kind], folder, ignore=shutil.ignore_patterns("*.safetensors", "cache"))
    assert len(pictures(Page(write_report(folder, pictures=False)).source)) == 3 + others
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


def contents(page):
    return {(picture.size, picture.convert("RGB").tobytes()) for picture in pictures(page.source)}


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
        f"kind: dreambooth\ndata: {{instance_data_dir: {tmp_path}/many}}\n"
    )
    assert len(contents(Page(write_report(bare)))) == 30
    shutil.rmtree(tmp_path / "many")
    assert not pictures(Page(write_report(bare)).source)


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


def line(step, **more):
    return json.dumps(
        {
            "step": step,
            "denoiser_loss": 1 / step,
            "images_per_second": 8.0,
            "peak_memory_gib": 1.5,
            **more,
        }
    )


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


PROBE = """<script>
const frames = [...document.querySelectorAll(".stack figure")];
const visible = f => getComputedStyle(f).visibility == "visible";
const seen = () => frames.filter(visible).map(f => f.textContent);
const slider = document.querySelector(".frames input"), chart = document.querySelector(".chart");
const shown = seen(), svg = chart.querySelector("svg"), box = svg.getBoundingClientRect();
slider.value = 0;
slider.dispatchEvent(new Event("input"));
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left, clientY: box.top}));
console.log("PROBE" + JSON.stringify({
  width: document.documentElement.scrollWidth, inner: innerWidth, shown: shown, first: seen(),
  at: chart.querySelector(".at").textContent, value: chart.querySelector("b").textContent,
}) + "END");
</script>"""


def browse(page, width, folder):
    """What the browser writes on its console and asks of the network for HTML in a frame of that
    width."""
    browser = shutil.which("chromium") or pytest.skip(
        "there is no chromium: install Debian's package of that name"
    )
    (folder / "report.html").write_text(page, "utf-8")
    # a window is never as narrow as a phone; a frame may be
    frame = f'<iframe src="report.html" width="{width}" height="2800" style="border: 0"></iframe>'
    (folder / "window.html").write_text(f'<body style="margin: 0">{frame}</body>')
    done = subprocess.run(
        [
            *(
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
            ),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
            ),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *(
                f"--user-data-dir={folder}/profile",
                f"--log-net-log={folder}/net.json",
                "--enable-logging=stderr",
            ),
            *(f"--window-size={max(width, 500)},2800", f"--screenshot={folder}/shot.png"),
            f"file://{folder}/window.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    starts = re.findall(
        r'"initiator":"([^"]*)".*?"url":"(https?:[^"]*)"', (folder / "net.json").read_text()
    )
    message = re.findall(r'CONSOLE\S* "(.*?)", source:', done.stderr, re.DOTALL)
    return message, [
        url for origin, url in starts if origin != "not an origin"
    ]  # that is the browser's own


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows_it_without_complaint_request_or_sideways_scroll(
    runs, kind, width, tmp_path
):
    """Prints where the screenshot is, to be looked at."""
    page = write_report(runs[kind]).read_text("utf-8").replace("</body>", f"{PROBE}</body>")
    complaints, asked = browse(page, width, tmp_path)
    print(tmp_path / "shot.png")
    assert len(complaints) == 1  # by the probe
    page_state = json.loads(re.search("PROBE(.*)END", complaints[0])[1])
    assert (page_state["width"], page_state["inner"]) == (width, width)
    assert (page_state["shown"], page_state["first"]) == (["step 6"], ["step 2"])
    first = json.loads((runs[kind] / "metrics.jsonl").read_text().splitlines()[0])
    assert page_state["at"] == "step 1"
    assert float(page_state["value"]) == pytest.approx(
        next(v for k, v in first.items() if k.endswith("_loss")), rel=0.01
    )
    with Image.open(tmp_path / "shot.png") as shot:
        assert (
            len(set(shot.convert("L").crop((0, 0, width, 2800)).tobytes())) > 50
        )  # something is drawn
    assert not asked


@pytest.mark.slow
def test_the_policy_keeps_a_picture_from_outside_away_and_a_request_would_be_seen(runs, tmp_path):
    page = (
        write_report(runs["gan"])
        .read_text("utf-8")
        .replace("</main>", '<img src="http://a.invalid/b.png"></main>')
    )
    (message,), asked = browse(page, 390, tmp_path)
    assert "violates the following Content Security Policy" in message
    assert not asked
    message, asked = browse(re.sub("<meta http-equiv.*?>", "", page), 390, tmp_path)
    assert "http://a.invalid/b.png" in asked
