"""What the scripts share: exit statuses, the config of a finished run, quiet libraries.

Nothing slow is imported at the top, so that signals are bound within the first moments.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import MappingProxyType
from typing import TYPE_CHECKING

from trainers.errors import Interrupted, UserError
from trainers.training.process_state import ignore_signals, is_first_process, stop_request

if TYPE_CHECKING:
    from trainers.config import Config, DreamBoothConfig
    from trainers.training.run_weights import RunWeights

# a launcher ends the other processes of a machine within this time after the first has ended
LAUNCHER_SECONDS = 2.0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is printed as one line, without the source line that raised it."""

    def plain_line(message: Warning | str, *_: object) -> str:
        return f"warning: {' '.join(str(message).split())}\n"

    before = warnings.formatwarning
    warnings.formatwarning = plain_line
    try:
        yield
    finally:
        warnings.formatwarning = before


@plain_warnings()
def run_main(main: Callable[[], int | None]) -> int:
    """Run `main`; 0 or what it returns, 2 for the user's mistake, 1 for a failure around it, 128 +
    a signal.

    The signals stay bound: one that comes while the interpreter ends makes no traceback.
    """
    # registered before all else, so called after all else
    atexit.register(ignore_signals)
    stop_request.listen(ends_process=True)
    try:
        return main() or 0
    except UserError as error:
        return report_error(error)
    except KeyboardInterrupt:  # where a library has bound SIGINT anew
        return report_stop(Interrupted(SIGINT))
    except Interrupted as stop:
        return report_stop(stop)
    except Exception:
        # what the launcher took with it, such as a connection, failed before its end was noticed
        if stop_request.launcher_is_gone() and not stop_request.signal_number:
            return report_stop(Interrupted(SIGTERM))
        raise


def report_error(error: UserError) -> int:
    """Tell what went wrong, a mistake that all processes of a machine make by the first alone."""
    if error.status == UserError.status and os.environ.get("LOCAL_RANK", "0") != "0":
        stop_request.is_reported = True
        time.sleep(LAUNCHER_SECONDS)
    return report(str(error), error.status)


def report_stop(stop: Interrupted) -> int:
    """Tell that a signal has stopped the run, in the first of its processes."""
    return report(str(stop) if is_first_process() else "", 128 + stop.signal_number)


def report(message: str, status: int) -> int:
    stop_request.is_reported = True
    if message:
        with suppress(OSError):  # nobody reads it any more
            print(message, file=sys.stderr, flush=True)
    return status


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `find_weights` takes."""
    parser.add_argument("--base", help="The base model; a run folder knows its own.")
    help = "The pipeline that has the settings of a base in one file, as model.config in a run."
    parser.add_argument("--base-config", metavar="FOLDER", help=help)


def find_weights(
    weights: Path, base: str | None, base_config: str | None = None
) -> tuple[DreamBoothConfig, Path]:
    """The config of RUN, RUN@STEP or RUN@best, or the defaults for a LoRA file, a PEFT folder or a
    tuned pipeline on `base`; and where the weights lie.

    base_config: what has the settings of a base in one file.
    """
    from trainers.config import DreamBoothConfig, ModelConfig
    from trainers.config.dreambooth_rules import is_single_file
    from trainers.run_folder import PIPELINE
    from trainers.training.run_weights import is_run

    if is_run(weights):
        found = find_run(weights, "dreambooth")
        config, weights = found.config, found.folder
        base = base or (None if config.lora else str(weights / PIPELINE))
    elif base and (
        weights.is_file() or any(weights.glob("**/adapter_config.json")) or is_pipeline(weights)
    ):
        # only now, because it imports torch, which takes seconds
        silence_libraries()
        from trainers.families import detect_family

        config = DreamBoothConfig(model=ModelConfig(family=detect_family(base)))
    else:
        raise UserError(
            f"{weights} is neither a run folder nor a LoRA file; a file needs --base MODEL beside "
            f"it"
        )
    if base:
        model = {"pretrained_model_name_or_path": base, "revision": None, "variant": None}
        if not is_single_file(base):
            model["config"] = None
        config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    if base_config:
        if not is_single_file(config.model.pretrained_model_name_or_path):
            raise UserError("--base-config is for a base in one file, and this one has its own")
        model = {"config": base_config}
        config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    return config, weights


def find_run(argument: Path, kind: str = "") -> RunWeights:
    """The weights of RUN, RUN@STEP or RUN@best; which those of a run that was stopped are, or the
    best, is told."""
    from trainers.training.run_weights import find_run_weights

    found = find_run_weights(argument, kind)
    if found.note:
        print(found.note)
    return found


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def parse_picture_arguments(
    description: str,
    kind: str,
    out: str,
    help: str,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[argparse.Namespace, Config]:
    """The command line RUN PICTURE_OR_FOLDER ... [--out OUT] with all pictures found, and the run's
    config.

    flags: further options that are on or off, with their help.
    """
    parser = make_parser(description)
    parser.add_argument("run", type=Path, help=f"The run folder of a finished {kind}.")
    help_pictures = "Pictures, or folders with pictures."
    parser.add_argument("pictures", type=Path, nargs="+", help=help_pictures)
    parser.add_argument("--out", type=Path, default=Path(out), help=help)
    for flag, flag_help in flags.items():
        parser.add_argument(flag, action="store_true", help=flag_help)
    arguments = parser.parse_args()
    from trainers.run_folder import load_run_config

    config = load_run_config(arguments.run, kind)
    silence_libraries()
    from trainers.data.pictures import collect_image_files

    arguments.pictures = collect_image_files(arguments.pictures)
    return arguments, config


def positive_int(text: str) -> int:
    """A number from 1, for `add_argument`."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add CONFIG and section.key=value ...; CONFIG may be left out if there is a default."""
    usual = "such as configs/quickstart.yaml" if default is None else f"by default {default}"
    nargs = None if default is None else "?"
    parser.add_argument("config", nargs=nargs, default=default, help=f"A YAML file, {usual}.")
    help = "Values that replace those in the file, such as optimizer.learning_rate=1e-4."
    # without a default argparse says that they are required
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=help)


def parse_config_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """The arguments of a parser with `add_config_arguments`; options and overrides may be mixed.

    words: by default those of the command line. Raises: UserError that says for each unknown
    option how its setting is written.
    """
    from trainers.config.command_line import option_errors

    words = sys.argv[1:] if words is None else words
    # an unknown option's value would be taken for the config, which is then not the mistake
    arguments, unknown = parser.parse_known_intermixed_args(words)
    errors = list(option_errors(unknown, words))
    if errors:
        raise UserError("\n".join(errors))
    arguments.overrides = [*arguments.overrides, *unknown]
    return arguments


def silence_libraries() -> None:
    """Keep the libraries' notices out of the progress line; to be called before they are used."""
    # on a CPU it advises a kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
