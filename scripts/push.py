"""Push a finished run to the Hub, as its own config says unless told otherwise.

python scripts/push.py RUN [--repo USER/NAME] [--private] [--revision BRANCH | --create-pr]
"""

import sys
from pathlib import Path

from trainers.cli import exit_status, parser_of
from trainers.run_folder import finished


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--repo", dest="hub_model_id", help="USER/NAME of the repository")
    parser.add_argument("--private", action="store_true", default=None, help="create it as private")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", dest="hub_revision", help="branch, made if it is lacking")
    target.add_argument("--create-pr", action="store_true", default=None, help="open a pull request")
    arguments = parser.parse_args()
    config = finished(arguments.run)

    from trainers.publishing.hub import check_access, push
    from trainers.publishing.report import write_report

    chosen = {name: value for name, value in vars(arguments).items() if value is not None and name != "run"}
    if chosen.keys() & {"hub_revision", "create_pr"}:
        chosen = {"hub_revision": None, "create_pr": False} | chosen
    hub = config.hub.model_copy(update={"push_to_hub": True} | chosen)
    config = config.model_copy(update={"output_dir": arguments.run, "hub": hub})
    repo = check_access(config)
    if not (arguments.run / "report_public.html").is_file():
        write_report(arguments.run, pictures=False)
    print(push(config, repo))


if __name__ == "__main__":
    sys.exit(exit_status(main))
