"""The pictures of a run as a resumed run compares them: contents, captions, masks, order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainers.data.pictures import Picture

# name, digest of the contents, caption or label
PictureEntry = tuple[str, str, str]

MAX_LISTED_FILES = 1000  # of a larger pool of pictures only the digest is kept


def describe_pictures(entries: Iterable[PictureEntry]) -> dict[str, Any]:
    """The digest of a pool of pictures in their order and, of a small one, each file's digests."""
    entries = list(entries)
    contents = json.dumps([entry[1:] for entry in entries])
    digest = hashlib.sha256(contents.encode()).hexdigest()
    facts: dict[str, Any] = {"count": len(entries), "digest": digest}
    if 0 < len(entries) <= MAX_LISTED_FILES:
        # some may be named from here, others from the root
        paths = [os.path.abspath(name) for name, _, _ in entries]
        parent = os.path.commonpath([Path(path).parent for path in paths])
        facts["files"] = {}
        for name, (_, content, text) in zip(paths, entries, strict=True):
            text_digest = hashlib.sha256(text.encode()).hexdigest()
            facts["files"][os.path.relpath(name, parent)] = [content[:16], text_digest[:16]]
    return facts


def describe_pools(
    pools: Sequence[Sequence[Picture]], names: Sequence[str] = ("instance", "class")
) -> dict[str, Any]:
    """Each pool of pictures by its name, those of each concept apart, and the masks of the first,
    as far as there are any."""
    by_pool: dict[str, list[Picture]] = {}
    for name, pool in zip(names, pools, strict=False):
        for picture in pool:
            title = f"{picture.concept}: {name}" if picture.concept else name
            by_pool.setdefault(title, []).append(picture)
    described = {}
    for title, pictures in by_pool.items():
        entries = ((p.name, p.digest, counted_caption(p)) for p in pictures)
        described[title] = describe_pictures(entries)
    # a mask also belongs to its picture
    masks = [(p.mask, f"{i}") for i, p in enumerate(pools[0]) if p.mask]
    if masks:
        # as earlier versions called that of the instance pictures
        mask_name = "mask" if names[0] == "instance" else f"mask of {names[0]}"
        described[mask_name] = describe_pictures((m.name, m.digest, place) for m, place in masks)
    return described


def counted_caption(picture: Picture) -> str:
    """The caption, or all of several, and, if it is not once, how often the picture counts."""
    captions = json.dumps(picture.captions) if picture.other_captions else picture.caption
    times = "" if picture.repeats == 1 else f" x {picture.repeats}"
    return captions + times
