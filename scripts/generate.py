"""Make pictures with a finished run, or with any LoRA file.

python scripts/generate.py RUN --prompt "a photo of a sks dog on the beach" [--num-images 4] [--seed
0] python scripts/generate.py LORA.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5
--prompt ...
"""

import sys
from pathlib import Path

from trainers.cli import load_weights_config, make_parser, positive_int, run_main, silence_libraries


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("weights", type=Path, help="a run folder or a LoRA .safetensors file")
    parser.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    parser.add_argument("--base", help="base model; a run folder knows its own")
    parser.add_argument(
        "--resolution", type=positive_int, help="side in pixels; a run has its own, a file 512"
    )
    parser.add_argument("--num-images", type=positive_int, help="pictures per prompt")
    parser.add_argument("--seed", type=int, help="picture i starts from the noise of seed + i")
    parser.add_argument(
        "--steps", type=positive_int, dest="num_inference_steps", help="sampler steps"
    )
    parser.add_argument(
        "--guidance", type=float, dest="guidance_scale", help="classifier-free guidance"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("generated"), help="folder for the pictures"
    )
    arguments = parser.parse_args()
    silence_libraries()

    import torch

    from trainers.distributed.accelerator import best_device
    from trainers.efficiency.apply import open_family
    from trainers.families.sampling import write_samples
    from trainers.lora.files import load_lora
    from trainers.run_folder import GRID_NAME, WEIGHT_NAME

    config = load_weights_config(arguments.weights, arguments.base)
    overrides = {
        k: getattr(arguments, k)
        for k in ("num_images", "seed", "num_inference_steps", "guidance_scale")
    }
    overrides = {"prompts": arguments.prompt} | {
        k: v for k, v in overrides.items() if v is not None
    }
    config = config.model_copy(
        update={"validation": config.validation.model_copy(update=overrides)}
    )
    if arguments.resolution:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"resolution": arguments.resolution})}
        )
    device = best_device()
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    family = open_family(config.model, device, half)
    family.load("vae", family.denoiser_name, *family.text_encoder_names)
    if config.lora:
        weights = arguments.weights
        load_lora(family, weights / WEIGHT_NAME if (weights / WEIGHT_NAME).is_file() else weights)
    family.apply_memory_options()
    write_samples(family, config, arguments.out)
    print(arguments.out / GRID_NAME)


if __name__ == "__main__":
    sys.exit(run_main(main))
