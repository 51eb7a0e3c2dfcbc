"""Write what a run folder holds as one HTML file: pictures over time, curves, metrics, settings.

python scripts/report.py RUN [--public]

It needs no network. With --public it shows no training picture and may be uploaded.
"""

import sys
from pathlib import Path

from trainers.cli import make_parser, run_main


def main() -> None:
    parser = make_parser(__doc__)
    help = "The run folder of any trainer, finished or not."
    parser.add_argument("run", type=Path, help=help)
    help = "Write report_public.html, without the training pictures."
    parser.add_argument("--public", action="store_true", help=help)
    arguments = parser.parse_args()

    from trainers.publishing.report import write_report

    print(write_report(arguments.run, pictures=not arguments.public))


if __name__ == "__main__":
    sys.exit(run_main(main))
