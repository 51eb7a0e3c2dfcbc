"""How the small Hub of local_hub.py answers: as much of the real protocol as the client needs."""

import base64
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.shared.hub_repositories import Commit, File, Refusal, Repo

# of the tokens, which all belong to the user "me"
ROLES = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained"}
FINE = "me/mine"  # where the fine-grained token may write


class Handler(BaseHTTPRequestHandler):
    """One request; its `server` is a `local_hub.Hub`."""

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
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
            case ["POST", "preupload", ref]:
                self.preupload(self.head(repo, ref))
            case ["POST" | "GET", "discussions", *number]:
                self.discussion(name, repo, *number)
            case _:
                self.write(name, repo, parts)

    def preupload(self, commit: Commit) -> None:
        """Which files go as LFS objects: those with a zero byte."""
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"
            oid = commit.files[path].oid if path in commit.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def discussion(self, name: str, repo: Repo, number: str | None = None) -> None:
        """A new pull request, or what is known of one."""
        if number is None:
            self.answer({"num": self.propose(repo)})
            return
        self.answer(
            {
                "title": "",
                "num": int(number),
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "draft",
                "repo": {"name": name, "type": "model"},
                "events": [],
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
            }
        )

    def write(self, name: str, repo: Repo, parts: list[str]) -> None:
        match parts:
            case ["GET", "auth-check", "write"]:
                self.check_writer(name)
                self.answer({})
            case ["POST", "branch", branch]:
                self.check_writer(name)
                repo.refs[branch] = list(repo.refs["main"])
                self.answer({})
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
        # it is enough to be somebody to propose
        proposal = self.proposes or ref.startswith("refs/pr/")
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
