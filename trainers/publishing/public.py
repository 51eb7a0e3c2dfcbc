"""What of a config may leave the machine: nothing that tells where, or by whom, it was run.

The card, the headers of LoRA files, `report_public.html` and the uploaded `config.yaml` all go
through `public_config`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from trainers.config import Config
from trainers.config.base_sections import Section
from trainers.config.loading import dump_config

AnyConfig = TypeVar("AnyConfig", bound=Config)

# These say where a run reports to and what it keeps, and are no part of the result.
PRIVATE_SECTIONS = ("checkpoint", "tracking", "hub")
# Keys whose text is a name on the Hub or a place on this machine.
NAME_OR_PATH_KEYS = ("pretrained_model_name_or_path", "config", "dataset_name", "init_from")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# wandb would send the host, the command line, the console and the state of the git repository
TRACKER_OPTIONS = {
    "wandb": {
        "settings": {
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "host": "private",
            "x_disable_meta": True,
        }
    }
}


def is_local(name: str) -> bool:
    """Whether a model or data set lies on this machine; otherwise the name is one on the Hub."""
    return not HUB_NAME.fullmatch(name) or Path(name).exists()


def public_name(config: Config) -> str:
    """The name of the run: its repository's, or its folder's."""
    return (config.hub.hub_model_id or config.output_dir.name).rpartition("/")[2]


def public_config(config: AnyConfig) -> AnyConfig:
    """The config with a placeholder for each place on this machine; names on the Hub stay.

    `data.instance_data_dir` becomes INSTANCE_DATA_DIR, for the name of a folder may be a person's.
    """
    update: dict[str, Any] = {"output_dir": Path(public_name(config))}
    for name, section in config:
        if name in PRIVATE_SECTIONS:
            update[name] = type(section)()
        elif isinstance(section, Section):
            update[name] = section.model_copy(update=placeholders(section))
    return config.model_copy(update=update)


def public_text(config: Config) -> str:
    """The YAML of a config as it may be read by others."""
    return dump_config(public_config(config), leave_out=PRIVATE_SECTIONS)


def placeholders(section: Section) -> dict[str, Any]:
    """What stands for the places on this machine, by their keys."""
    found: dict[str, Any] = {}
    for key, value in section:
        if isinstance(value, list) and any(isinstance(part, Section) for part in value):
            found[key] = [
                part.model_copy(update=placeholders(part)) if isinstance(part, Section) else part
                for part in value
            ]
        elif isinstance(value, Path):
            found[key] = Path(key.upper())
        elif key in NAME_OR_PATH_KEYS and value is not None and is_local(value):
            found[key] = key.upper()
    return found
