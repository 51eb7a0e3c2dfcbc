"""Show a folder of runs in the browser: state, step, losses and newest samples, side by side.

python scripts/watch.py [RUNS] [--port PORT]

The page is served to this machine alone, and reads itself anew. On another machine, forward the
port first: ssh -L 8765:127.0.0.1:8765 HOST
"""

import argparse
import sys
from pathlib import Path

from trainers.cli import make_parser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "A folder of run folders, or one of them; by default runs."
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help=help)
    help = "The port; 0 takes any that is free."
    parser.add_argument("--port", type=int, default=8765, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from trainers.publishing.watch import make_server

    with make_server(arguments.runs, arguments.port) as server:
        host, port = server.server_address[:2]
        print(f"{arguments.runs}: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(run_main(main))
