"""Write the generated pages of docs/, or check all pages.

python scripts/documentation [--check]

Generated are docs/reference (every key of the configs, every script) and docs/migration (other
trainers' keys). With --check nothing is written: it exits with status 1 when a page is stale, or
when a command, an override, a Python snippet or a link in README.md, docs/ or configs/ is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from documentation.code_blocks import ROOT
from documentation.mistakes import all_mistakes
from documentation.pages import generated_pages, stale_pages
from trainers.cli import make_parser, run_main


def main() -> int:
    parser = make_parser(__doc__)
    help = "Check, and write nothing."
    parser.add_argument("--check", action="store_true", help=help)
    if not parser.parse_args().check:
        for name, text in generated_pages().items():
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(text, "utf-8")
        return 0
    mistakes = [*stale_pages(), *all_mistakes()]
    print("\n".join(mistakes) or "every page is up to date, and every command in them is right")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
