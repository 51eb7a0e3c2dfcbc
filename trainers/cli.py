"""What the scripts share: exit statuses, the config of a finished run, quiet libraries."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.config import Config, DreamBoothConfig, ModelConfig
from trainers.errors import Interrupted, UserError
from trainers.run_folder import load_run_config


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
    a signal."""
    try:
        return main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except Interrupted as stop:
        print(
            f"stopped by signal {stop.signal_number}; the same command goes on from the checkpoint",
            file=sys.stderr,
        )
        return 128 + stop.signal_number


def load_weights_config(weights: Path, base: str | None) -> DreamBoothConfig:
    """A run's own config, or the defaults for a LoRA file, a PEFT folder or a tuned pipeline on
    `base`."""
    if (weights / "config.yaml").is_file():
        config = load_run_config(weights, "dreambooth")
        base = base or (None if config.lora else str(weights / "pipeline"))
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
        config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    return config


def is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def parse_picture_arguments(
    description: str, kind: str, out: str, help: str
) -> tuple[argparse.Namespace, Config]:
    """The command line RUN PICTURE_OR_FOLDER ... [--out OUT] with all pictures found, and the run's
    config."""
    parser = make_parser(description)
    parser.add_argument("run", type=Path, help=f"The run folder of a finished {kind}.")
    help_pictures = "Pictures, or folders with pictures."
    parser.add_argument("pictures", type=Path, nargs="+", help=help_pictures)
    parser.add_argument("--out", type=Path, default=Path(out), help=help)
    arguments = parser.parse_args()
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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=help)


def silence_libraries() -> None:
    """Keep the libraries' notices out of the progress line; to be called before they are used."""
    # on a CPU it advises a kernel that nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
