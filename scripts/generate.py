"""Make pictures with a run, with the LoRA of one of its steps, or with any LoRA file.

python scripts/generate.py RUN --prompt "a photo of a sks dog on the beach" [--num-images 4]
python scripts/generate.py RUN@STEP --prompt "a photo of a sks dog"
python scripts/generate.py RUN@best --prompt "a photo of a sks dog"
python scripts/generate.py LORA.safetensors --base MODEL --prompt "a photo of a sks dog"
"""

import argparse
import sys
from pathlib import Path

from trainers.cli import (
    add_base_arguments,
    find_weights,
    make_parser,
    positive_int,
    run_main,
    silence_libraries,
)
from trainers.config import DreamBoothConfig
from trainers.config.trigger import fill_given

# the arguments that replace a value of the run's section `validation`
VALIDATION_KEYS = ("prompts", "num_images", "seed", "num_inference_steps", "guidance_scale")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = "A run folder, RUN@STEP, RUN@best or a LoRA .safetensors file."
    parser.add_argument("weights", type=Path, help=help)
    help = "What the pictures shall show; it may be given several times."
    parser.add_argument("--prompt", action="append", required=True, dest="prompts", help=help)
    add_base_arguments(parser)
    help = "The side in pixels. By default the run's own, and 512 for a file."
    parser.add_argument("--resolution", type=positive_int, help=help)
    parser.add_argument("--num-images", type=positive_int, help="Pictures per prompt.")
    parser.add_argument("--seed", type=int, help="Picture i starts from the noise of seed + i.")
    help = "Steps of the sampler."
    parser.add_argument("--steps", type=positive_int, dest="num_inference_steps", help=help)
    help = "Strength of the classifier-free guidance."
    parser.add_argument("--guidance", type=float, dest="guidance_scale", help=help)
    help = "Chunks of 75 tokens in which CLIP reads a prompt. By default the run's own, and 1."
    parser.add_argument("--clip-chunks", type=positive_int, help=help)
    help = "The folder for the pictures."
    parser.add_argument("--out", type=Path, default=Path("generated"), help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config, weights = find_weights(arguments.weights, arguments.base, arguments.base_config)
    config = apply_arguments(config, arguments)
    silence_libraries()

    from trainers.distributed.accelerator import best_device, preferred_dtype
    from trainers.efficiency.apply import open_family
    from trainers.families.sampling import write_samples
    from trainers.lora.files import load_lora
    from trainers.run_folder import GRID_NAME, WEIGHT_NAME

    device = best_device()
    family = open_family(config.model, device, preferred_dtype(device))
    family.load("vae", family.denoiser_name, *family.text_encoder_names)
    if config.lora:
        file = weights / WEIGHT_NAME
        load_lora(family, file if file.is_file() else weights)
    family.apply_memory_options()
    write_samples(family, config, arguments.out)
    print(arguments.out / GRID_NAME)


def apply_arguments(config: DreamBoothConfig, arguments: argparse.Namespace) -> DreamBoothConfig:
    """The run's config with what the command line says instead."""
    values = {key: getattr(arguments, key) for key in VALIDATION_KEYS}
    given = {key: value for key, value in values.items() if value is not None}
    given["prompts"] = fill_given(arguments.prompts, config.data.trigger)
    sections = {"validation": config.validation.model_copy(update=given)}
    if arguments.clip_chunks:
        chunks = {"clip_chunks": arguments.clip_chunks}
        sections["model"] = config.model.model_copy(update=chunks)
    if arguments.resolution:
        sections["data"] = config.data.model_copy(update={"resolution": arguments.resolution})
    return config.model_copy(update=sections)


if __name__ == "__main__":
    sys.exit(run_main(main))
