"""Write a LoRA in another program's format, at a lower rank, or into the weights of its base.

python scripts/export.py RUN --format kohya
    for ComfyUI, A1111 and sd-scripts; RUN@STEP is the LoRA of a step, RUN@best the best
python scripts/export.py LORA.safetensors --base MODEL --rank 4 [--format diffusers]
python scripts/export.py RUN --format merged --out FOLDER
    a whole pipeline, which needs no LoRA reader
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

DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "A run folder, RUN@STEP, RUN@best, a LoRA file, a PEFT folder or a tuned pipeline."
    parser.add_argument("source", type=Path, help=help)
    parser.add_argument("--format", choices=[*FORMATS, "merged"], default="diffusers")
    help = "Write the nearest LoRA of this rank, by SVD."
    parser.add_argument("--rank", type=positive_int, help=help)
    parser.add_argument("--base", help="The base model; a run folder knows its own.")
    help = "The precision of a merged pipeline."
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=help)
    help = "A file, or a folder for peft and merged. By default it lies beside the source."
    parser.add_argument("--out", type=Path, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config, source = find_weights(arguments.source, arguments.base)
    silence_libraries()

    from trainers.families import FAMILIES
    from trainers.lora.export import base_architecture, make_metadata
    from trainers.lora.files import read_lora
    from trainers.lora.update import max_relative_difference

    family = FAMILIES[config.model.family](config.model)
    lora = load_source(source, arguments.rank, family)
    out = arguments.out or default_path(source, arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "merged":
        write_merged(family, lora, arguments.dtype, out)
        return
    load_format(arguments.format).write(
        lora, family, out, make_metadata(config, base_architecture(family))
    )
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
    suffix = "" if format == "merged" else load_format(format).SUFFIX
    return folder / f"{stem}{rank}_{format}{suffix}"


def write_merged(family: Family, lora: Lora, dtype: str, out: Path) -> None:
    """Write the base's pipeline with the updates in its weights."""
    import torch

    from trainers.lora.base_layers import merge_lora
    from trainers.lora.export import save_pipeline

    family.dtype = getattr(torch, dtype)
    family.load(family.denoiser_name, *family.clip_encoders)
    lost = merge_lora(family, lora)
    save_pipeline(family, family.clip_encoders, out)
    print(f"{out}: {len(lora)} layers merged; rounding to {dtype} costs {lost:.1e} of the updates")


if __name__ == "__main__":
    sys.exit(run_main(main))
