"""What the small Hub of local_hub.py keeps: files, commits, branches, and the faults it was asked
for."""

import hashlib
import time
from dataclasses import dataclass, field


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
