"""What the scripts share: exit statuses, the config of a finished run, quiet libraries."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from trainers.config import Config, DreamBoothConfig, ModelConfig
from trainers.errors import Interrupted, UserError
from trainers.run_folder import load_run_config


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
        from trainers.families import detect_family  # and so torch, which takes seconds

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
    parser.add_argument("run", type=Path, help=f"the run folder of a {kind}")
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders with pictures")
    parser.add_argument("--out", type=Path, default=Path(out), help=help)
    for flag, flag_help in flags.items():
        parser.add_argument(flag, action="store_true", help=flag_help)
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


def silence_libraries() -> None:
    """Keep the libraries' notices out of the progress line."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it advises a kernel that nothing here needs
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
