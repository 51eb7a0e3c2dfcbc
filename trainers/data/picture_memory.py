"""What was found out about pictures, so that the next run need not decode them to know it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import PIL

from trainers.data.decoding import StoredAs
from trainers.data.known_values import KnownValues, settled_state

if TYPE_CHECKING:
    from trainers.data.pictures import Picture


@dataclass(frozen=True)
class PictureFacts:
    """What one decoding of a picture tells.

    size: width and height in pixels, upright; fingerprint: of its pixels, whatever file holds them;
    perceptual_hash: see `near_duplicates`; edge_blur: see `sharpness`.
    """

    size: tuple[int, int]
    fingerprint: str
    storage: StoredAs
    perceptual_hash: str | None
    edge_blur: float | None


@dataclass(frozen=True)
class KnownPicture:
    """digest: of what decides the pixels, see `Picture.digest`."""

    digest: str
    facts: PictureFacts


class PictureMemory(KnownValues):
    """The digests of files that stay as they are, and the facts of pictures by their digests."""

    def examine(self, picture: Picture) -> Picture:
        """The picture with all that is known of it, which is found out where it is not.

        Raises: UserError, as `Picture.decode`.
        """
        name, state, data = file_name(picture), None, None
        if picture.file:
            state = settled_state(picture.file)
        known_state, digest = self.known.get(name, (None, None))
        if state is None or state != known_state:
            data = picture.read_named()
            digest = picture.content_digest(data)
        key = f"facts {PIL.__version__} {digest}"
        facts = read_facts(self.known.get(key))
        if facts is None:
            facts = picture.examine(picture.read_named() if data is None else data)
            self.known[key] = asdict(facts)
        if state is not None:
            self.known[name] = [state, digest]
        return replace(picture, known=KnownPicture(digest, facts))


def file_name(picture: Picture) -> str:
    """What the digest of a picture's file is remembered by; the depth is a part of the digest."""
    depth = "" if picture.bit_depth is None else f" bit depth {picture.bit_depth}"
    return f"file {os.path.abspath(picture.file or picture.name)}{depth}"


def read_facts(value: Any) -> PictureFacts | None:
    """The facts as they were written; None for what another version has written."""
    try:
        storage = dict(value["storage"])
        storage["size"] = tuple(storage["size"])
        look = value["perceptual_hash"], value["edge_blur"]
        size, fingerprint = tuple(value["size"]), value["fingerprint"]
        return PictureFacts(size, fingerprint, StoredAs(**storage), *look)
    except (TypeError, KeyError, ValueError):
        return None
