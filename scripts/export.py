"""Write a trained LoRA in another program's format, at a lower rank, or into the weights of its
base.

python scripts/export.py RUN --format kohya                     for ComfyUI, A1111, sd-scripts
python scripts/export.py LORA.safetensors --base MODEL --rank 4 [--format diffusers]
python scripts/export.py RUN --format merged --out FOLDER       a whole pipeline, which needs no
LoRA reader python scripts/export.py TUNED_PIPELINE --base MODEL --rank 16  what its training added
to the base, as LoRA
"""

import sys
from pathlib import Path

from trainers import run_folder
from trainers.cli import (
    is_pipeline,
    load_weights_config,
    make_parser,
    positive_int,
    run_main,
    silence_libraries,
)
from trainers.lora.formats import FORMATS, load_format


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "source", type=Path, help="a run folder, a LoRA file, a PEFT folder or a tuned pipeline"
    )
    parser.add_argument("--format", choices=[*FORMATS, "merged"], default="diffusers")
    parser.add_argument("--rank", type=positive_int, help="the nearest LoRA of this rank, by SVD")
    parser.add_argument("--base", help="base model; a run folder knows its own")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of merged"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a file, for peft and merged a folder; by default beside the source",
    )
    arguments = parser.parse_args()
    config = load_weights_config(arguments.source, arguments.base)
    silence_libraries()

    import torch

    from trainers.families import FAMILIES
    from trainers.lora import base_layers, low_rank
    from trainers.lora.export import base_architecture, make_metadata, save_pipeline
    from trainers.lora.files import read_lora
    from trainers.lora.update import max_relative_difference

    source, family = arguments.source, FAMILIES[config.model.family](config.model)
    parts = (family.denoiser_name, *family.clip_encoders)
    if is_pipeline(source):
        model, rank = (
            config.model.model_copy(update={"pretrained_model_name_or_path": str(source)}),
            arguments.rank or 16,
        )
        lora, lost = base_layers.extract_lora(family, type(family)(model), rank)
        print(
            f"LoRA of rank {rank} holds all but {lost:.2%} of what training changed (Frobenius "
            f"norm)"
        )
    else:
        file = source / run_folder.WEIGHT_NAME
        lora = read_lora(file if file.is_file() else source, family)
        if arguments.rank:
            lora, lost = low_rank.reduce_rank(lora, arguments.rank)
            print(
                f"rank {arguments.rank}: relative error of the updates {lost:.2e} (Frobenius norm)"
            )
    stem = source.name if source.is_dir() else source.stem
    stem += f"_rank{arguments.rank}" if arguments.rank else ""
    folder = source if (source / run_folder.CONFIG_NAME).is_file() else source.parent
    is_merged = arguments.format == "merged"
    ending = "" if is_merged else load_format(arguments.format).SUFFIX
    out = arguments.out or folder / f"{stem}_{arguments.format}{ending}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_merged:
        family.dtype = getattr(torch, arguments.dtype)
        family.load(*parts)
        lost = base_layers.merge_lora(family, lora)
        save_pipeline(family, family.clip_encoders, out)
        print(
            f"{out}: {len(lora)} layers merged; rounding to {arguments.dtype} costs {lost:.1e} of "
            f"the updates"
        )
        return
    load_format(arguments.format).write(
        lora, family, out, make_metadata(config, base_architecture(family))
    )
    difference = max_relative_difference(lora, read_lora(out, family))
    print(f"{out}: {len(lora)} layers; read back, they differ by at most {difference:.1e}")


if __name__ == "__main__":
    sys.exit(run_main(main))
