"""Train what a YAML file describes.

python scripts/train.py configs/NAME.yaml [section.key=value ...]             (one process)
accelerate launch -q [...] scripts/train.py configs/NAME.yaml [section.key=value ...] (several)
"""

import sys

from trainers.cli import (
    add_config_arguments,
    make_parser,
    parse_config_arguments,
    run_main,
    silence_libraries,
)


def main() -> None:
    parser = make_parser(__doc__)
    add_config_arguments(parser)
    arguments = parse_config_arguments(parser)
    from trainers.config.loading import load_config

    # before the slow imports, so that a mistake is reported at once
    config = load_config(arguments.config, arguments.overrides)
    silence_libraries()
    from trainers.run import run

    run(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
