"""A real browser shows the report without complaint or request."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.shared.reports import KINDS
from trainers.publishing.report import write_report

pytestmark = pytest.mark.filterwarnings("ignore:the discriminator tells")

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
