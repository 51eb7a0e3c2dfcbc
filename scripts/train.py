"""Train what a YAML file describes.

accelerate launch scripts/train.py configs/NAME.yaml [section.key=value ...]
python scripts/train.py configs/NAME.yaml                                     (one process)
"""

import sys

from trainers.cli import make_parser, run_main, silence_libraries


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="section.key=value, such as optimizer.learning_rate=1e-4"
    )
    arguments = parser.parse_args()
    from trainers.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)  # before the slow imports
    silence_libraries()
    from trainers.run import run

    run(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
