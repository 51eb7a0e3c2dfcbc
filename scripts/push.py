"""Push a finished run to the Hub, as its own config says unless told otherwise.

python scripts/push.py RUN [--repo USER/NAME] [--private] [--revision BRANCH | --create-pr]
"""

import sys
from pathlib import Path

from trainers.cli import make_parser, run_main
from trainers.run_folder import PUBLIC_REPORT_NAME, load_run_config


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="A finished run folder.")
    parser.add_argument("--repo", dest="hub_model_id", help="USER/NAME of the repository.")
    help = "Create the repository as private."
    parser.add_argument("--private", action="store_true", default=None, help=help)
    target = parser.add_mutually_exclusive_group()
    help = "The branch to push to, which is created if need be."
    target.add_argument("--revision", dest="hub_revision", help=help)
    help = "Open a pull request."
    target.add_argument("--create-pr", action="store_true", default=None, help=help)
    arguments = parser.parse_args()
    config = load_run_config(arguments.run)

    from trainers.publishing.hub import check_access, push_run
    from trainers.publishing.report import write_report

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    overrides = {name: value for name, value in given.items() if name != "run"}
    if overrides.keys() & {"hub_revision", "create_pr"}:
        overrides = {"hub_revision": None, "create_pr": False} | overrides
    hub = config.hub.model_copy(update={"push_to_hub": True} | overrides)
    config = config.model_copy(update={"output_dir": arguments.run, "hub": hub})
    repo = check_access(config)
    if not (arguments.run / PUBLIC_REPORT_NAME).is_file():
        write_report(arguments.run, pictures=False)
    print(push_run(config, repo))


if __name__ == "__main__":
    sys.exit(run_main(main))
