"""A small Hub on loopback: as much of its protocol as the real client needs to push a model and to
load it again.

Repositories have commits, branches, proposals and readers; files are regular, LFS or Xet; answers
fail when asked to.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub.utils import http_backoff

ROLES = {
    "hf_write": "write",
    "hf_read": "read",
    "hf_fine": "fineGrained",
}  # tokens, all of the user "me"
FINE = "me/mine"  # where the fine-grained token may write
ONES = b"\xff" * 32


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    message: str
    files: dict[str, File]
    oid: str = field(default_factory=lambda: f"{time.time_ns():040x}")


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, list[Commit]] = field(  # branches and refs/pr/N, oldest commit first
        default_factory=lambda: {
            "main": [Commit("initial commit", {".gitattributes": File(b"", False)})]
        }
    )

    def log(self, ref: str = "main") -> list[str]:
        """Messages of what was pushed, newest first."""
        return [commit.message for commit in self.refs[ref][:0:-1]]


@dataclass
class Fault:
    route: str  # a regular expression for "METHOD path"
    status: int | None  # None closes the connection without an answer
    times: float


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


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


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def serve(self) -> None:
        self.body, url = (
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
            urlsplit(self.path),
        )
        self.proposes = "create_pr" in parse_qs(url.query)
        route = f"{self.command} {unquote(url.path)}"
        self.server.requests.append(route)
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.route, route):
                fault.times -= 1
                return self.answer({"error": "a fault"}, fault.status) if fault.status else None
        try:
            match [self.command, *map(unquote, url.path.strip("/").split("/"))]:
                case [method, "api", "models", user, name, *rest]:
                    self.model(f"{user}/{name}", [method, *rest])
                case ["GET" | "HEAD", user, name, "resolve", ref, *path]:
                    self.resolve(self.head(self.repo(f"{user}/{name}"), ref), "/".join(path))
                case parts:
                    self.site(parts)
        except Refusal as refusal:
            self.answer({"error": refusal.code}, refusal.status, {"X-Error-Code": refusal.code})

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

    def site(self, parts: list[str]) -> None:
        objects, address = self.server.objects, self.server.address
        asked = json.loads(self.body) if self.command == "POST" else {}
        match parts:
            case ["GET", "api", "whoami-v2"]:
                if self.role is None:
                    raise Refusal(401, "Unauthorized")
                self.answer(
                    {
                        "name": "me",
                        "auth": {"accessToken": {"displayName": "laptop", "role": self.role}},
                    }
                )
            case ["POST", "api", "repos", "create"]:
                name = f"{asked['organization'] or 'me'}/{asked['name']}"
                self.check_writer(name)
                known = name in self.server.repos
                self.server.repos.setdefault(name, Repo(asked.get("visibility") == "private"))
                self.answer({"url": f"{address}/{name}"}, 409 if known else 200)
            case ["POST", "api", "validate-yaml"]:
                header = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
                valid = header and isinstance(yaml.safe_load(header[1]), dict)
                self.answer(
                    {"errors": [] if valid else [{"message": "no metadata"}]}, 200 if valid else 400
                )
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                for each in asked["objects"]:
                    if each["oid"] not in objects:
                        places = {
                            "upload": f"{self.server.storage}/lfs/{each['oid']}",
                            "verify": f"{address}/verify",
                        }
                        each["actions"] = {
                            action: {"href": href} for action, href in places.items()
                        }
                self.answer({"objects": asked["objects"]})
            case ["PUT", "lfs", oid]:
                objects[oid] = self.body
                self.answer({})
            case ["POST", "verify"]:
                self.answer(
                    {}, 200 if len(objects.get(asked["oid"], b"")) == asked["size"] else 404
                )
            case ["GET", "lfs", oid]:
                self.answer(objects[oid])
            case _:
                raise Refusal(404, self.path)

    def model(self, name: str, parts: list[str]) -> None:
        repo = self.repo(name)
        match parts:
            case ["GET"] | ["GET", "revision", _]:
                commit = self.head(repo, *parts[2:])
                siblings = [{"rfilename": path} for path in commit.files]
                self.answer(
                    {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}
                )
            case ["GET", "tree", ref]:
                files = self.head(repo, ref).files
                self.answer(
                    [
                        {"type": "file", "path": k, "size": len(v.content), "oid": v.oid}
                        for k, v in files.items()
                    ]
                )
            case ["GET", "auth-check", "write"]:
                self.check_writer(name)
                self.answer({})
            case ["POST", "branch", branch]:
                self.check_writer(name)
                repo.refs[branch] = list(repo.refs["main"])
                self.answer({})
            case ["POST", "discussions"]:
                self.answer({"num": self.propose(repo)})
            case ["GET", "discussions", number]:
                about = {
                    "title": "",
                    "num": int(number),
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "draft",
                }
                about |= {
                    "repo": {"name": name, "type": "model"},
                    "events": [],
                    "isPullRequest": True,
                }
                self.answer(
                    about | {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
                )
            case ["POST", "preupload", ref]:
                known, files = self.head(repo, ref).files, []
                for file in json.loads(self.body)["files"]:
                    mode = "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"
                    oid = known[file["path"]].oid if file["path"] in known else None
                    files.append(
                        {
                            "path": file["path"],
                            "uploadMode": mode,
                            "shouldIgnore": False,
                            "oid": oid,
                        }
                    )
                self.answer({"files": files})
            case ["GET", "xet-write-token", ref]:
                self.check_writer(name, ref)
                store = self.server.root.with_name(f"xet-{time.time_ns()}")
                self.server.stores.append(store)
                self.answer({"casUrl": f"local://{store}", "exp": 2**40, "accessToken": "x"})
            case ["POST", "commit", ref]:
                self.check_writer(name, ref)
                self.commit(name, repo, ref)
            case _:
                raise Refusal(404, self.path)

    def commit(self, name: str, repo: Repo, ref: str) -> None:
        hub, changes = self.server, {}
        header, *lines = map(json.loads, self.body.splitlines())
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = File(base64.b64decode(value["content"]), False)
            else:
                if value["oid"] not in hub.objects:
                    hub.read_xet()
                changes[value["path"]] = File(hub.objects[value["oid"]], True)
        number = self.propose(repo) if self.proposes else None
        commits = repo.refs[f"refs/pr/{number}" if number else ref]
        commits.append(Commit(header["value"]["summary"], commits[-1].files | changes))
        for path, file in changes.items() if commits is repo.refs["main"] else ():
            (hub.root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (hub.root / name / path).write_bytes(file.content)
        about = {
            "commitUrl": f"{hub.address}/{name}/commit/{commits[-1].oid}",
            "commitOid": commits[-1].oid,
        }
        self.answer(about | {"pullRequestUrl": f"{hub.address}/{name}/discussions/{number}"})

    def resolve(self, commit: Commit, path: str) -> None:
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound")
        file = commit.files[path]
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{file.oid}"',
            "X-Linked-Size": len(file.content),
        }
        if file.lfs:
            self.answer({}, 302, headers | {"Location": f"{self.server.storage}/lfs/{file.oid}"})
        else:
            self.answer(file.content, 200, headers)

    @property
    def role(self) -> str | None:
        return ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def check_writer(self, name: str, ref: str = "main") -> None:
        proposal = self.proposes or ref.startswith(
            "refs/pr/"
        )  # for which it is enough to be somebody
        if not (self.role == "write" or (self.role == "fineGrained" and name == FINE)):
            raise Refusal(403, "Forbidden")
        if not (proposal or name.startswith("me/")):
            raise Refusal(403, "Forbidden")

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos or (self.server.repos[name].private and self.role is None):
            raise Refusal(404, "RepoNotFound")
        return self.server.repos[name]

    def head(self, repo: Repo, ref: str = "main") -> Commit:
        heads = repo.refs | {commits[-1].oid: commits for commits in repo.refs.values()}
        if ref not in heads:
            raise Refusal(404, "RevisionNotFound")
        return heads[ref][-1]

    def propose(self, repo: Repo) -> int:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        repo.refs[f"refs/pr/{number}"] = list(repo.refs["main"])
        return number

    def answer(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


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
