"""Write a LoRA in another program's format, at a lower rank, or into the weights of its base.

python scripts/export.py RUN --format kohya
    for ComfyUI, A1111 and sd-scripts; RUN@STEP is the LoRA of a step, RUN@best the best
python scripts/export.py LORA.safetensors --base MODEL --rank 4 [--format diffusers]
python scripts/export.py RUN --format merged --out FOLDER
    a whole pipeline, which needs no LoRA reader
python scripts/export.py RUN --format single_file --dtype float16
    the same as one file, for ComfyUI and A1111
python scripts/export.py TUNED_PIPELINE --base MODEL --rank 16
    what its training added to the base, as LoRA
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainers import run_folder
from trainers.cli import (
    add_base_arguments,
    find_weights,
    is_pipeline,
    make_parser,
    positive_int,
    run_main,
    silence_libraries,
)
from trainers.lora.formats import FORMATS, load_format
from trainers.training.run_weights import is_run, split_step

if TYPE_CHECKING:
    from trainers.families import Family
    from trainers.lora.update import Lora

WHOLE_MODELS = {"merged": "", "single_file": ".safetensors"}  # and what their names end with
DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "A run folder, RUN@STEP, RUN@best, a LoRA file, a PEFT folder or a tuned pipeline."
    parser.add_argument("source", type=Path, help=help)
    parser.add_argument("--format", choices=[*FORMATS, *WHOLE_MODELS], default="diffusers")
    help = "Write the nearest LoRA of this rank, by SVD."
    parser.add_argument("--rank", type=positive_int, help=help)
    add_base_arguments(parser)
    help = "The precision of a merged pipeline, or of one file."
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=help)
    help = "A file, or a folder for peft and merged. By default it lies beside the source."
    parser.add_argument("--out", type=Path, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config, source = find_weights(arguments.source, arguments.base, arguments.base_config)
    silence_libraries()

    from trainers.families import FAMILIES
    from trainers.lora.export import base_architecture, make_metadata
    from trainers.lora.files import read_lora
    from trainers.lora.update import max_relative_difference

    family = FAMILIES[config.model.family](config.model)
    lora = load_source(source, arguments.rank, family)
    out = arguments.out or default_path(source, arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    architecture = base_architecture(family)
    metadata = make_metadata(config, architecture)
    if arguments.format in WHOLE_MODELS:
        metadata["modelspec.architecture"] = architecture
        write_whole(family, lora, arguments, out, metadata)
        return
    load_format(arguments.format).write(lora, family, out, metadata)
    difference = max_relative_difference(lora, read_lora(out, family))
    print(f"{out}: {len(lora)} layers; read back, they differ by at most {difference:.1e}")


def load_source(source: Path, rank: int | None, family: Family) -> Lora:
    """The source's updates, at the rank that was asked for."""
    from trainers.lora import base_layers, low_rank
    from trainers.lora.files import read_lora

    if is_pipeline(source):
        rank = rank or 16
        model = family.model.model_copy(update={"pretrained_model_name_or_path": str(source)})
        lora, lost = base_layers.extract_lora(family, type(family)(model), rank)
        change = "what training changed (Frobenius norm)"
        print(f"LoRA of rank {rank} holds all but {lost:.2%} of {change}")
        return lora
    file = source / run_folder.WEIGHT_NAME
    lora = read_lora(file if file.is_file() else source, family)
    if rank:
        lora, lost = low_rank.reduce_rank(lora, rank)
        print(f"rank {rank}: relative error of the updates {lost:.2e} (Frobenius norm)")
    return lora


def default_path(source: Path, arguments: argparse.Namespace) -> Path:
    """In the run folder, or beside any other source."""
    format = arguments.format
    run, step = split_step(source)
    if is_run(source):
        folder, stem = run, run.name if step is None else f"{run.name}@{step}"
    else:
        folder, stem = source.parent, source.name if source.is_dir() else source.stem
    rank = f"_rank{arguments.rank}" if arguments.rank else ""
    is_whole = format in WHOLE_MODELS
    suffix = WHOLE_MODELS[format] if is_whole else load_format(format).SUFFIX
    return folder / f"{stem}{rank}_{format}{suffix}"


def write_whole(
    family: Family, lora: Lora, arguments: argparse.Namespace, out: Path, metadata: dict[str, str]
) -> None:
    """Write the base's pipeline with the updates in its weights, as a folder or one file."""
    import torch

    from trainers.lora.base_layers import merge_lora
    from trainers.lora.export import save_pipeline
    from trainers.lora.single_file import save_single_file

    family.dtype = getattr(torch, arguments.dtype)
    is_folder = arguments.format == "merged"
    parts = family.clip_encoders if is_folder else ("vae", *family.text_encoder_names)
    family.load(family.denoiser_name, *parts)
    lost = merge_lora(family, lora)
    if is_folder:
        save_pipeline(family, family.clip_encoders, out)
    else:
        save_single_file(family, out, metadata)
    rounding = f"rounding to {arguments.dtype} costs {lost:.1e} of the updates"
    print(f"{out}: {len(lora)} layers merged; {rounding}")


if __name__ == "__main__":
    sys.exit(run_main(main))
