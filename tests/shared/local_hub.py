"""A small Hub on loopback: as much of its protocol as the real client needs to push a model and to
load it again.

Repositories have commits, branches, proposals and readers; files are regular, LFS or Xet; answers
fail when asked to.
"""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import http_backoff

from tests.shared.hub_protocol import Handler
from tests.shared.hub_repositories import Fault, Repo

ONES = b"\xff" * 32


class Hub(ThreadingHTTPServer):
    """`root` mirrors the files of each repository's main branch."""

    daemon_threads = True
    request_queue_size = 64  # the client opens many connections at once

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.address = root, f"http://127.0.0.1:{self.server_port}"
        self.storage = (
            f"http://localhost:{self.server_port}"  # another origin, as LFS objects have on the Hub
        )
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.stores: list[Path] = []  # of Xet, one for each token that was handed out
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def fail(self, route: str, status: int | None, times: float = float("inf")) -> None:
        self.faults.append(Fault(route, status, times))

    def read_xet(self) -> None:
        """Take in what clients put into the stores. They may still lock them, so copies are read.

        A shard is made of records of 48 bytes. After its header there are, for each file, its hash
        with the number n of its parts at byte 36, n parts with their lengths at byte 36, n checks,
        and its SHA-256; ones end the list.
        """
        import hf_xet

        while self.stores:
            store = self.stores.pop()
            copy, infos = Path(shutil.copytree(store, f"{store}.copy")), []
            for shard in copy.glob("xet/xorbs/shards/*.mdb"):
                data = shard.read_bytes()
                records = [data[i : i + 48] for i in range(48, len(data), 48)]
                while not records[0].startswith(ONES):
                    head, count = records[0], int.from_bytes(records[0][36:40], "little")
                    digest = b"".join(head[i : i + 8][::-1] for i in range(0, 32, 8)).hex()
                    size = sum(
                        int.from_bytes(part[36:40], "little") for part in records[1 : count + 1]
                    )
                    infos.append(hf_xet.XetFileInfo(digest, size))
                    records = records[2 * count + 2 :]
            paths = [copy / str(i) for i in range(len(infos))]
            access = {"endpoint": f"local://{copy}", "token": "", "token_expiry_unix_secs": 2**40}
            with hf_xet.XetSession().new_file_download_group(**access) as group:
                for info, path in zip(infos, paths, strict=True):
                    group.start_download_file(info, str(path))
            for content in map(Path.read_bytes, paths):
                self.objects[hashlib.sha256(content).hexdigest()] = content


@contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client in this process talks to the Hub, logged in as one who may write, and does not
    wait to try again."""
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet_cache"))
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0)
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.address)
    constants = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """The folder that mirrors the repositories of a `Hub`."""
    with serving(tmp_path, monkeypatch) as server:
        yield server.root
