"""Train what a YAML file describes.

accelerate launch scripts/train.py configs/NAME.yaml [section.key=value ...]
python scripts/train.py configs/NAME.yaml                                     (one process)
"""

import sys

from trainers.cli import exit_status, parser_of, silence
from trainers.config.loading import load


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as optimizer.learning_rate=1e-4")
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.overrides)  # before the slow imports
    silence()
    from trainers.run import run

    run(config)


if __name__ == "__main__":
    sys.exit(exit_status(main))
