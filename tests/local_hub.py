"""As much of the Hub's protocol as the real client needs to upload a model and to load it again, in one folder."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    root: Path  # of the repositories

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.strip("/").split("/")
        match parts:
            case ["api", "repos", "create"]:
                wish = json.loads(body)
                name = f"{wish.get('organization') or 'me'}/{wish['name']}"
                (self.root / name).mkdir(parents=True)
                self.answer({"url": f"{self.server.address}/{name}", "id": name})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
            case ["api", "models", user, name, "commit", _]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        path = self.root / user / name / line["value"]["path"]
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(base64.b64decode(line["value"]["content"]))
                self.answer({"commitUrl": f"{self.server.address}/{user}/{name}/commit/0", "commitOid": COMMIT})
            case _:
                self.answer({"error": self.path}, 404)

    def do_GET(self):
        parts = self.path.strip("/").split("/")
        path = self.root.joinpath(*parts[:2], *parts[4:])
        if parts[2:3] == ["resolve"] and path.is_file():
            content = path.read_bytes()
            self.answer(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        else:
            self.answer({"error": self.path}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content, status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """The folder that stands for the Hub's repositories; the client in this process talks to it, logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("LocalHub", (Hub,), {"root": tmp_path / "hub"}))
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = "huggingface_hub.constants"
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.address)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()
