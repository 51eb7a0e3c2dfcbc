"""What becomes of another trainer's keys, from the tables by which its configs are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from documentation.code_blocks import ROOT
from trainers.config.importers import (
    ai_toolkit,
    diffusers_scripts,
    import_config,
    kohya,
    onetrainer,
    simpletuner,
)
from trainers.config.importers.base import (
    Choice,
    Rule,
    is_on,
    number,
    only_if_on,
    positive,
    same,
    sides,
)

EXAMPLES = ROOT / "tests/shared/foreign_configs"


@dataclass(frozen=True)
class Tool:
    """A trainer whose configs can be imported: the page's name, its title, and an example."""

    name: str
    title: str
    module: ModuleType
    example: str
    config: str  # what its config is

    @property
    def rules(self) -> Sequence[Rule]:
        return self.module.RULES


TOOLS = (
    Tool("sd_scripts", "sd-scripts (kohya)", kohya, "sd_scripts.toml", "TOML of `--config_file`"),
    Tool("ai_toolkit", "ai-toolkit", ai_toolkit, "ai_toolkit.yaml", "YAML job"),
    Tool("simpletuner", "SimpleTuner", simpletuner, "simpletuner.json", "`config/config.json`"),
    Tool("onetrainer", "OneTrainer", onetrainer, "onetrainer.json", "JSON of a preset or config"),
    Tool(
        "diffusers",
        "the diffusers scripts",
        diffusers_scripts,
        "diffusers_flux.sh",
        "command line, in a text file",
    ),
)
DIFFERENCES: dict[Callable, str] = {
    same: "",
    number: "",
    is_on: "",
    only_if_on: "only where it is on",
    positive: "only where it is more than 0",
    sides: "the side of a square with the same area",
}
PAGE = """# Coming from {title}

```bash
python scripts/import_config.py FILE --out configs/mine.yaml
```

reads the {config} and writes a config of this toolkit. Each key of the result says in a comment
where it comes from, and what has no equal here is listed at the end. What is still missing, such as
a folder that does not exist, is printed.

## Keys

| theirs | ours | what differs |
| --- | --- | --- |
{rows}

These keys have no effect on the training here, or are always on: {without_effect}.

## An example

Some keys are worked out from several others, or from the other trainer's defaults. The example
shows them: this config

```{language}
{example}
```

becomes

```yaml
{result}
```
"""


def page(tool: Tool) -> str:
    path = EXAMPLES / tool.example
    without = ", ".join(f"`{name}`" for name in tool.module.WITHOUT_EFFECT)
    return PAGE.format(
        title=tool.title,
        config=tool.config,
        rows="\n".join(rows(tool.rules)),
        without_effect=without,
        # what is YAML here is checked as one of our own configs
        language={".json": "json", ".toml": "toml"}.get(path.suffix, "text"),
        example=path.read_text("utf-8").rstrip(),
        result=import_config(Path(path)).to_yaml().rstrip(),
    )


def rows(rules: Sequence[Rule]) -> Iterator[str]:
    for rule in rules:
        notes = [part for part in (difference(rule.convert), rule.note) if part]
        yield f"| `{rule.theirs}` | `{rule.ours}` | {'. '.join(notes)} |"


def difference(convert: Callable) -> str:
    """How a value changes, in words."""
    if isinstance(convert, Choice):
        changed = {old: new for old, new in convert.table.items() if old != new}
        return ", ".join(f"`{old}` becomes `{new}`" for old, new in changed.items())
    if convert in DIFFERENCES:
        return DIFFERENCES[convert]
    # a conversion of this key alone: what it makes of a switch that is on
    value = convert("1")
    if isinstance(value, list):
        return "a list here"
    if value is None or value == "1":
        return ""
    return f"on means `{str(value).lower() if isinstance(value, bool) else value}`"
