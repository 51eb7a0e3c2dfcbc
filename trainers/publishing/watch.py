"""A folder of runs as a page that compares them, served to this machine alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from PIL import Image

from trainers.errors import UserError
from trainers.publishing.html import environment, is_finite_number
from trainers.run_folder import (
    CONFIG_NAME,
    FINAL,
    GRID_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SAMPLES,
    read_metrics,
    sample_grids,
)
from trainers.training.progress import name_losses
from trainers.training.status import RunStatus, read_status

HOST = "127.0.0.1"
# What a browser may call this machine: a page from elsewhere that points its own name here, to read
# the runs, has another.
HOST_NAMES = ("127.0.0.1", "localhost")
MAX_DEPTH = 3  # of run folders below the folder
MAX_RUNS = 500
THUMBNAIL_SIDE = 320
SPARK_WIDTH, SPARK_HEIGHT, MAX_SPARK_POINTS = 160, 40, 160
# a page holds no script and fetches nothing but pictures of this server
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
REPORT_POLICY = f"{POLICY}; script-src 'unsafe-inline'"
REFRESH_SECONDS = 10


@dataclass(frozen=True)
class RunSummary:
    """A row of the page. address: the name of the run in the server's paths."""

    name: str
    address: str
    status: RunStatus | None
    step: int
    losses: dict[str, float]
    spark: str
    has_report: bool
    has_grid: bool

    @property
    def state(self) -> str:
        return self.status.state if self.status else "unknown"


@dataclass(frozen=True)
class Answer:
    content: bytes
    content_type: str
    policy: str = POLICY


def find_runs(root: Path) -> dict[str, Path]:
    """The run folders in a folder, or the folder itself, by their path in it; links that lead out
    of it are left out.

    Raises: UserError when there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder")
    root = root.resolve()
    runs: dict[str, Path] = {}
    folders = [root]
    for _ in range(MAX_DEPTH + 1):
        below: list[Path] = []
        for folder in folders:
            if (folder / CONFIG_NAME).is_file():
                runs[folder.relative_to(root).as_posix()] = folder
            else:
                below += subfolders(folder, root)
        folders = below
    return dict(list(runs.items())[:MAX_RUNS])


def subfolders(folder: Path, root: Path) -> list[Path]:
    """The folders in a folder that lie below the root, wherever links lead; hidden ones are not
    shown."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    shown = [path for path in entries if path.name[0] != "." and path.is_dir()]
    return [path for path in shown if path.resolve().is_relative_to(root)]


def summarize(name: str, run: Path) -> RunSummary:
    """What the page tells of a run, whatever state its folder is in."""
    metrics = run / METRICS_NAME
    rows = cached_losses(run, changed_at(metrics)) if metrics.is_file() else ()
    status = read_status(run)
    last = rows[-1] if rows else (0, {})
    return RunSummary(
        name=run.name if name == "." else name,
        address=quote(name, safe=""),
        status=status,
        step=max(last[0], status.step if status else 0),
        losses=last[1],
        spark=sparkline([next(iter(losses.values())) for _, losses in rows if losses]),
        has_report=(run / REPORT_NAME).is_file(),
        has_grid=newest_grid(run) is not None,
    )


def changed_at(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_mtime_ns, info.st_size


@lru_cache(MAX_RUNS)
def cached_losses(run: Path, changed: tuple[int, int]) -> tuple[tuple[int, dict[str, float]], ...]:
    """The step and the losses of each line of the metrics, read when the file has changed."""
    rows = []
    for line in read_metrics(run):
        numbers = {}
        for name, value in line.items():
            if is_finite_number(value):
                numbers[name] = value
        rows.append((line["step"], name_losses(numbers)))
    return tuple(rows)


def sparkline(values: list[float]) -> str:
    """The points of a curve in SPARK_WIDTH x SPARK_HEIGHT; empty for less than two values."""
    every = max(1, len(values) // MAX_SPARK_POINTS)
    values = values[::every]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    height = (high - low) or 1
    points = []
    for i, value in enumerate(values):
        x = i / (len(values) - 1) * SPARK_WIDTH
        points.append(f"{x:.1f},{SPARK_HEIGHT * (1 - (value - low) / height):.1f}")
    return " ".join(points)


def newest_grid(run: Path) -> Path | None:
    """The grid of the final samples, or else of the last ones."""
    final = run / SAMPLES / FINAL / GRID_NAME
    if final.is_file():
        return final
    return next(reversed(sample_grids(run)), None)


def render_index(root: Path) -> Answer:
    runs = [summarize(name, run) for name, run in find_runs(root).items()]
    page = environment.get_template("watch.html.jinja").render(
        title=root.resolve().name,
        runs=runs,
        refresh_seconds=REFRESH_SECONDS,
        width=SPARK_WIDTH,
        height=SPARK_HEIGHT,
    )
    return Answer(page.encode(), "text/html; charset=utf-8")


def serve_report(run: Path, root: Path) -> Answer | None:
    page = below(run / REPORT_NAME, root)
    return page and Answer(page.read_bytes(), "text/html; charset=utf-8", REPORT_POLICY)


def serve_grid(run: Path, root: Path) -> Answer | None:
    """The newest grid of a run, small; None where there is none that can be read."""
    grid = newest_grid(run)
    if grid is None or not below(grid, root):
        return None
    content = thumbnail(grid, changed_at(grid))
    return content and Answer(content, "image/webp")


def below(path: Path, root: Path) -> Path | None:
    """The file, if it is one and lies below the root, wherever links lead."""
    target = path.resolve()
    return target if target.is_file() and target.is_relative_to(root.resolve()) else None


@lru_cache(MAX_RUNS)
def thumbnail(grid: Path, changed: tuple[int, int]) -> bytes | None:
    buffer = io.BytesIO()
    try:
        with Image.open(grid, formats=["png"]) as picture:
            small = picture.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(buffer, "webp", quality=82)
    return buffer.getvalue()


# what a run has under /run/ADDRESS/
PAGES: dict[str, Callable[[Path, Path], Answer | None]] = {
    REPORT_NAME: serve_report,
    GRID_NAME: serve_grid,
}


def answer(root: Path, address: str) -> Answer | None:
    """What lies at a path of the server; None for every other one.

    A path is compared with the names of what there is, and never becomes the name of a file.
    """
    match address.partition("?")[0].split("/"):
        case ["", ""]:
            return render_index(root)
        case ["", "run", name, page] if page in PAGES:
            run = find_runs(root).get(unquote(name))
            return PAGES[page](run, root) if run else None
    return None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; nothing can be changed."""

    server_version, sys_version = "watch", ""

    def __init__(self, root: Path, *arguments: object) -> None:
        self.root = root
        super().__init__(*arguments)

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOST_NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        found = answer(self.root, self.path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": found.content_type,
            "Content-Length": str(len(found.content)),
            "Content-Security-Policy": found.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(found.content)

    do_HEAD = do_GET  # noqa: N815 (the library's name)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not told."""


class Server(ThreadingHTTPServer):
    """Says nothing of a browser that leaves before its answer is there."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(root: Path, port: int) -> ThreadingHTTPServer:
    """A server of the runs in a folder, on loopback; port 0: any that is free.

    Raises: UserError when the folder or the port cannot be had.
    """
    find_runs(root)
    try:
        return Server((HOST, port), partial(Handler, root))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used ({error})") from None
