"""Apply a trained U-Net to pictures of any size: masks, colours, other pictures, better ones.

python scripts/translate.py RUN PICTURE_OR_FOLDER ... [--out translated]
"""

import sys

from trainers.cli import parse_picture_arguments, run_main
from trainers.errors import UserError


def main() -> None:
    arguments, config = parse_picture_arguments(
        __doc__, "unet", out="translated", help="folder for the results, PNG"
    )

    from tqdm.auto import tqdm

    from trainers.unet import Translator

    translate, paths = Translator(config, arguments.run), arguments.pictures
    results = [arguments.out / f"{path.stem}.png" for path in paths]
    if twice := next((result for result in results if results.count(result) > 1), None):
        raise UserError(
            f"several pictures would become {twice}: translate them in two goes, with another --out"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path, result in zip(tqdm(paths, unit="picture"), results, strict=True):
        translate(path).save(result)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(run_main(main))
