"""Turn another trainer's config into one of ours.

    python scripts/import_config.py FILE [--out configs/mine.yaml]

FILE: a TOML of sd-scripts (kohya), a YAML of ai-toolkit, a JSON of SimpleTuner or OneTrainer, or a
text file with the command of a diffusers example script. Each key of the result says in a comment
where it comes from; what has no equal here is listed at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainers.cli import make_parser, run_main


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("file", type=Path, help="the other trainer's config")
    parser.add_argument("--out", type=Path, help="write it there instead of printing it")
    arguments = parser.parse_args()
    from trainers.config.importers import import_config
    from trainers.config.loading import validate
    from trainers.errors import UserError

    imported = import_config(arguments.file)
    text = imported.to_yaml()
    if arguments.out is None:
        print(text, end="")
    elif arguments.out.exists():
        raise UserError(f"{arguments.out} is there already: name another file, or remove it")
    else:
        arguments.out.write_text(text, "utf-8")
    _, mistakes = validate(imported.tree())
    for mistake in mistakes:
        print(f"still to mend: {mistake}", file=sys.stderr)
    if arguments.out:
        print(f"{len(imported.settings)} settings from {imported.tool}: {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_main(main))
