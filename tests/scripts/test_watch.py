"""scripts/watch.py shows the runs of a folder to this machine, and nothing else of it."""

import http.client
import io
import json
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from tests.shared.processes import call
from tests.shared.reports import line
from trainers.publishing.watch import answer, find_runs, make_server, sparkline
from trainers.training.status import RUNNING, new_status, write_status

NASTY = "<b>&'x"


@contextmanager
def serving(folder):
    """A function: path, headers, method -> (status, headers, content) of the server's answer."""
    server = make_server(folder, 0)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

    def ask(path, host=None, method="GET"):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        # the path goes out as it is
        connection.putrequest(method, path, skip_host=host is not None)
        if host is not None:
            connection.putheader("Host", host)
        connection.endheaders()
        response = connection.getresponse()
        answered = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return answered

    try:
        yield ask
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path):
    """Three runs: one that trains, one with a name to escape, one without anything but its config;
    and what lies beside them."""
    runs = tmp_path / "runs"
    for name in ("one", f"group/{NASTY}", "bare"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.yaml").write_text("kind: dreambooth\n")
    one = runs / "one"
    (one / "metrics.jsonl").write_text("\n".join(line(step) for step in range(1, 9)))
    (one / "samples/step-000004").mkdir(parents=True)
    Image.new("RGB", (900, 300), "red").save(one / "samples/step-000004/grid.png")
    (one / "report.html").write_text("<p>the report</p>")
    write_status(one, new_status(RUNNING, 9, 40))
    (runs / "notes.txt").write_text("private")
    (tmp_path / "secret.txt").write_text("secret")
    return runs


def test_the_page_compares_the_runs(folder):
    with serving(folder) as ask:
        status, headers, content = ask("/")
        page = content.decode()
        assert status == 200
        assert page.count("<li>") == 3
        assert 'href="/run/one/report.html"' in page
        assert '<span class="state running">running</span>' in page
        assert "step <b>9</b> of 40" in page
        assert "loss <b>0.125</b>" in page
        assert page.count("<polyline") == 1
        assert "group/&lt;b&gt;&amp;&#39;x" in page
        assert NASTY not in page
        assert 'http-equiv="refresh"' in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "http://" not in page
        assert "https://" not in page


def test_a_run_has_its_report_and_its_newest_samples_small(folder):
    with serving(folder) as ask:
        assert ask("/run/one/report.html")[2] == b"<p>the report</p>"
        status, headers, content = ask("/run/one/grid.png")
        assert (status, headers["Content-Type"]) == (200, "image/webp")
        assert Image.open(io.BytesIO(content)).size == (320, 107)
        assert ask("/run/bare/grid.png")[0] == 404
        assert ask("/run/one/report.html", method="HEAD")[2] == b""


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/run/../../secret.txt",
        "/run/..%2f..%2fsecret.txt/report.html",
        "/run/%2e%2e/report.html",
        "/run/one/../../../secret.txt",
        "/run/one/%2e%2e%2fnotes.txt",
        "/run/one/config.yaml",
        "/run/one/metrics.jsonl",
        "/notes.txt",
        "//secret.txt",
        "/run/link/report.html",
        "/run/one%00/report.html",
        "*",
    ],
)
def test_nothing_else_is_served(folder, path):
    (folder.parent / "report.html").write_text("secret")
    (folder / "link").symlink_to(folder.parent)
    assert answer(folder, "http://[") is None
    with serving(folder) as ask:
        status, _, content = ask(path)
        assert status in (400, 403, 404)
        assert b"secret" not in content
        assert b"private" not in content


def test_links_that_lead_out_of_the_folder_are_not_followed(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "config.yaml").write_text("kind: gan\n")
    (folder / "linked").symlink_to(outside)
    (folder / "bare/report.html").symlink_to(folder.parent / "secret.txt")
    assert "linked" not in find_runs(folder)
    with serving(folder) as ask:
        status, _, content = ask("/run/bare/report.html")
        assert status == 404
        assert b"secret" not in content


def test_another_name_for_this_machine_and_other_methods_are_refused(folder):
    """A page from elsewhere may point its own name at 127.0.0.1 and read what is there."""
    with serving(folder) as ask:
        assert ask("/", host="evil.example:8765")[0] == 403
        assert ask("/", host="")[0] == 403
        assert ask("/", host="localhost:8765")[0] == 200
        for method in ("POST", "PUT", "DELETE"):
            assert ask("/", method=method)[0] == 501


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "samples/step-000004/grid.png"])
@pytest.mark.parametrize("content", [b"\xff\x00{", b"null\n", b'{"step": 1e999, "state": []}\n'])
def test_a_damaged_file_of_a_run_costs_no_page(folder, name, content, recwarn):
    (folder / "one" / name).write_bytes(content)
    with serving(folder) as ask:
        status, _, page = ask("/")
        assert (status, page.count(b"<li>")) == (200, 3)
        assert ask("/run/one/grid.png")[0] in (200, 404)


def test_the_server_listens_on_loopback_alone(folder):
    with make_server(folder, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_run_whose_process_is_gone_is_told_as_such(folder):
    file = folder / "one/status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process_started_at": 5.0}))
    with serving(folder) as ask:
        assert b'<span class="state gone">gone</span>' in ask("/")[2]


def test_a_curve_has_at_most_so_many_points_and_fills_its_height():
    points = [tuple(map(float, p.split(","))) for p in sparkline([9.0, 1, 5] * 400).split()]
    assert len(points) <= 200
    assert (points[0], points[-1][0]) == ((0.0, 0.0), 160.0)
    assert {0.0, 20.0, 40.0} == {y for _, y in points}
    assert sparkline([1.0]) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere is no folder"), (["--port", "99999"], "--port 99999 cannot be used")],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert call("watch.py", *arguments) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert message in told
