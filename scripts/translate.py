"""Apply a trained U-Net to pictures of any size: masks, colours, other pictures, better ones.

python scripts/translate.py RUN PICTURE_OR_FOLDER ... [--out translated] [--full-size]

A picture is shown to the model as in training, and the result has the picture's own size.
"""

import sys

from trainers.cli import parse_picture_arguments, run_main
from trainers.errors import UserError


def main() -> None:
    full_size = "go over pictures at their own size in tiles, although training resized them"
    arguments, config = parse_picture_arguments(
        __doc__,
        "unet",
        out="translated",
        help="folder for the results, PNG",
        flags={"--full-size": full_size},
    )

    from trainers.data.pictures import picture_from_file
    from trainers.from_scratch.checks import warn_of_squashing
    from trainers.progress import track
    from trainers.unet import Translator

    translate = Translator(config, arguments.run, arguments.full_size)
    paths = arguments.pictures
    if not arguments.full_size:
        warn_of_squashing([picture_from_file(path) for path in paths], config)
    results = [arguments.out / f"{path.stem}.png" for path in paths]
    if twice := next((result for result in results if results.count(result) > 1), None):
        raise UserError(
            f"several pictures would become {twice}: translate them in two goes, with another --out"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path, result in zip(track(paths, "pictures"), results, strict=True):
        translate(path).save(result)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(run_main(main))
