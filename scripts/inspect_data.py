"""Show what a run would make of your photos, before anything is trained.

python scripts/inspect_data.py configs/NAME.yaml [section.key=value ...] [--output photos.html]

The page has every photo with its crops drawn, the size that it is trained at, its caption with what
the text encoders do not read, how often it is seen, copies, blur, and what becomes of every other
file. It needs no network and holds the photos themselves: it is for you alone. Errors that would
end a run are all told, and the exit status is then 2.

Of the base model only the tokenizers are read, or downloaded. Without them tokens are not counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainers.cli import (
    add_config_arguments,
    make_parser,
    parse_config_arguments,
    run_main,
    silence_libraries,
)
from trainers.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config_arguments(parser)
    help = "The page to write; by default photos.html."
    parser.add_argument("--output", type=Path, default=Path("photos.html"), help=help)
    help = "Write no page, only the text."
    parser.add_argument("--text", action="store_true", help=help)
    return parse_config_arguments(parser)


def main() -> int:
    arguments = parse_arguments()
    from trainers.config import DreamBoothConfig
    from trainers.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    if not isinstance(config, DreamBoothConfig):
        raise UserError(
            f"{arguments.config} is a run of {config.kind}: only DreamBooth runs have such photos"
        )
    silence_libraries()
    from trainers.inspection import inspect_photos
    from trainers.publishing.photo_page import describe_as_text, write_photo_page

    inspection = inspect_photos(config)
    print(describe_as_text(inspection))
    if not arguments.text:
        print(write_photo_page(inspection, config, arguments.output))
    return UserError.status if inspection.texts("error") else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
