"""Push a run to the Hub, as its own config says unless told otherwise.

python scripts/push.py RUN [--repo USER/NAME] [--private] [--revision BRANCH | --create-pr]
python scripts/push.py RUN@STEP --repo USER/NAME
    the LoRA of a step, with a card of its own; RUN@best: the weights in RUN/best
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from trainers.cli import find_run, make_parser, run_main
from trainers.run_folder import PUBLIC_REPORT_NAME


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="A run folder, RUN@STEP or RUN@best.")
    parser.add_argument("--repo", dest="hub_model_id", help="USER/NAME of the repository.")
    help = "Create the repository as private."
    parser.add_argument("--private", action="store_true", default=None, help=help)
    target = parser.add_mutually_exclusive_group()
    help = "The branch to push to, which is created if need be."
    target.add_argument("--revision", dest="hub_revision", help=help)
    help = "Open a pull request."
    target.add_argument("--create-pr", action="store_true", default=None, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    found = find_run(arguments.run)

    from trainers.publishing.hub import check_access, push_result, push_run
    from trainers.publishing.report import write_report
    from trainers.publishing.step_release import step_release
    from trainers.tensor_file import check_weights

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    overrides = {name: value for name, value in given.items() if name != "run"}
    if overrides.keys() & {"hub_revision", "create_pr"}:
        overrides = {"hub_revision": None, "create_pr": False} | overrides
    hub = found.config.hub.model_copy(update={"push_to_hub": True} | overrides)
    config = found.config.model_copy(update={"output_dir": found.run, "hub": hub})
    check_weights(found.folder)
    repo = check_access(config)
    with ExitStack() as stack:
        if found.step is not None:
            config = stack.enter_context(step_release(replace(found, config=config)))
            print(push_run(config, repo, found.name))
            return
        if not (found.run / PUBLIC_REPORT_NAME).is_file():
            write_report(found.run, pictures=False)
        print(push_result(config, repo))


if __name__ == "__main__":
    sys.exit(run_main(main))
