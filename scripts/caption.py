"""Write a caption beside each photo of a folder, by a model that describes pictures.

python scripts/caption.py FOLDER [--model HUB_NAME_OR_FOLDER] [--trigger WORD] [--prefix TEXT]

Photos that have a caption keep it; --overwrite replaces it. Each file is written when its caption
is known, so the same command goes on where it was stopped. Photos are decoded as for training, and
those in sub-folders too. Read what it wrote: a model sees things that are not there.

--trigger stands where the prefix has {trigger}, else before the caption: "sks, a dog on grass".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainers.cli import make_parser, positive_int, run_main, silence_libraries

# BSD-3-Clause, 470 million parameters, safetensors
DEFAULT_MODEL = "Salesforce/blip-image-captioning-large"
PLACE = "{trigger}"


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="The folder with the photos.")
    help = f"A repository on the Hub or a local folder; by default {DEFAULT_MODEL}."
    parser.add_argument("--model", default=DEFAULT_MODEL, help=help)
    help = "What the model is asked, such as '<CAPTION>' for Florence-2; by default its own way."
    parser.add_argument("--prompt", help=help)
    parser.add_argument("--prefix", default="", help="Text before each caption.")
    parser.add_argument("--trigger", help="The word for your subject.")
    help = "Replace the captions that are there."
    parser.add_argument("--overwrite", action="store_true", help=help)
    help = "Photos at a time; by default 4."
    parser.add_argument("--batch-size", type=positive_int, default=4, help=help)
    help = "The ending of the files; by default .txt."
    parser.add_argument("--suffix", choices=(".txt", ".caption"), default=".txt", help=help)
    return parser.parse_args()


def full_prefix(prefix: str, trigger: str | None) -> str:
    """What stands before each caption, with a space or comma where words would meet."""
    if trigger and PLACE in prefix:
        prefix = prefix.replace(PLACE, trigger)
    elif trigger:
        prefix = f"{prefix.rstrip()} {trigger}, ".lstrip()
    return prefix if not prefix or prefix[-1].isspace() else f"{prefix} "


def main() -> int:
    arguments = parse_arguments()
    silence_libraries()
    from trainers.captioning import CaptionSettings, caption_folder

    settings = CaptionSettings(
        prompt=arguments.prompt,
        prefix=full_prefix(arguments.prefix, arguments.trigger),
        suffix=arguments.suffix,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    done = caption_folder(arguments.folder, arguments.model, settings)
    print(f"{arguments.folder}: {done.num_written} captions written, {done.num_kept} were there")
    if done.num_masks:
        print(f"{done.num_masks} are named like the masks of others, and get none")
    for failure in done.failures:
        print(f"no caption: {failure}", file=sys.stderr)
    return 1 if done.failures else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
