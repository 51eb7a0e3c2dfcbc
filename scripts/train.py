"""Train what a YAML file describes.

accelerate launch scripts/train.py configs/NAME.yaml [section.key=value ...]
python scripts/train.py configs/NAME.yaml                                     (one process)
"""

import argparse
import sys

from trainers import UserError
from trainers.config import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as optimizer.learning_rate=1e-4")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.overrides)
        silence()
        from trainers.observers import Interrupted
        from trainers.run import run
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        run(config)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped by signal {stop.number}; the same command goes on from the checkpoint", file=sys.stderr)
        return 128 + stop.number
    return 0


def silence() -> None:
    """Keep the libraries' notices out of the progress line."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
