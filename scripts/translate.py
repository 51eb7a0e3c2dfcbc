"""Apply a trained U-Net to pictures of any size: masks, colours, other pictures, better ones.

python scripts/translate.py RUN PICTURE_OR_FOLDER ... [--out translated]
"""

import argparse
import sys
from pathlib import Path

from trainers import UserError
from trainers.cli import exit_status, finished, silence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder of a U-Net")
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders with pictures")
    parser.add_argument("--out", type=Path, default=Path("translated"), help="folder for the results, PNG")
    arguments = parser.parse_args()
    config = finished(arguments.run, "unet")
    silence()

    from tqdm.auto import tqdm

    from trainers.data import files
    from trainers.unet import Translator

    translate, paths = Translator(config, arguments.run), files(arguments.pictures)
    results = [arguments.out / f"{path.stem}.png" for path in paths]
    if twice := next((result for result in results if results.count(result) > 1), None):
        raise UserError(f"several pictures would become {twice}: translate them in two goes, with another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path, result in zip(tqdm(paths, unit="picture"), results, strict=True):
        translate(path).save(result)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
