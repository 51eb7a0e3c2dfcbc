"""Finished runs of every kind, and a reader of their reports."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from trainers.config import loading
from trainers.publishing.html import display_name
from trainers.run import run

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


@pytest.fixture(scope="session")
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


def contents(page):
    return {(picture.size, picture.convert("RGB").tobytes()) for picture in pictures(page.source)}


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
