"""Sets of photos of other trainers: one becomes the keys of our data section, several concepts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainers.config.importers.base import ForeignConfig, Rule
from trainers.config.photo_sections import PhotoSet

PhotoKeys = dict[str, Any]  # of our sets, with name and repeats


@dataclass
class ForeignSets:
    """What was found: sets to learn, and what held-out and class pictures there are for them."""

    learnt: list[PhotoKeys] = field(default_factory=list)
    shared: PhotoKeys = field(default_factory=dict)

    def add(self, keys: PhotoKeys) -> None:
        self.learnt.append({key: value for key, value in keys.items() if value is not None})


def convert(values: Mapping[str, Any], rules: Sequence[Rule]) -> PhotoKeys:
    """Our keys of a foreign set; those that say nothing are left out."""
    keys = {}
    for rule in rules:
        value = values.get(rule.theirs)
        converted = None if value is None else rule.convert(value)
        if converted is not None:
            keys[rule.ours] = converted
    return keys


def put_sets(config: ForeignConfig, sets: ForeignSets, source: str) -> None:
    """Set our keys: those of the data section for one set, data.concepts for several.

    What the config has said of all its photos goes into each concept. source: the foreign key.
    """
    for key, value in sets.shared.items():
        if f"data.{key}" not in config.settings:
            config.put(f"data.{key}", value, source)
    if len(sets.learnt) < 2:
        for keys in sets.learnt:
            for key, value in keys.items():
                # how often one set counts, and its name, say nothing
                if key in PhotoSet.model_fields:
                    config.put(f"data.{key}", value, source)
        return
    paths = {f"data.{key}": key for key in PhotoSet.model_fields}
    common = {
        paths[path]: config.settings.pop(path).value for path in [*config.settings] if path in paths
    }
    concepts, names = [], set()
    for i, keys in enumerate(sets.learnt, 1):
        name = to_name(str(keys.get("name") or ""))
        if name and name.lower() in names:
            name = f"{name}-{i}"
        names.add(name.lower())
        named = {"name": name} if name else {}
        concepts.append(named | common | {key: keys[key] for key in keys if key != "name"})
    config.put("data.concepts", concepts, source)


def to_name(text: str) -> str:
    """Letters, digits and single dashes of a foreign name; empty where it has none."""
    return re.sub(r"\W+", "-", text).strip("-")
