"""The model card, and the upload of a finished run."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token

from . import UserError
from .export import WEIGHT_NAME
from .sections import Config, DreamBoothConfig, ScratchConfig

SHARED = [
    "README.md",
    "config.yaml",
    WEIGHT_NAME,
    "pipeline/**",
    "model/**",
    "figures.json",
    "samples/final/*",
]  # never checkpoints or caches
PACKAGES = ("diffusion-trainers", "torch", "diffusers", "transformers", "peft", "accelerate")


def write_card(config: DreamBoothConfig, difference: float, pictures: int) -> None:
    """README.md of the run folder. difference: the reload proof's figure; pictures: how many were learnt from."""
    base, lora, train = config.model.pretrained_model_name_or_path, config.lora, config.train
    data, validation = config.data, config.validation
    public = not Path(base).exists()
    prompt = data.instance_prompt or next(iter(validation.prompts), "")
    header = {
        **({"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if public else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": prompt,
        "tags": ["text-to-image", "diffusers", "diffusers-training", "dreambooth", *(["lora"] if lora else [])],
        "widget": [
            {"text": p, "output": {"url": f"samples/final/{i:02d}-0.png"}} for i, p in enumerate(validation.prompts)
        ],
    }
    size, length = data.resolution, config.model.max_sequence_length
    load = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base if lora else "PATH_OR_REPO/pipeline"}")',
        *(['pipe.load_lora_weights("PATH_OR_REPO")'] if lora else []),
        f"image = pipe({prompt!r}, height={size}, width={size}, {f'max_sequence_length={length}, ' if length else ''}"
        f"num_inference_steps={validation.num_inference_steps}, guidance_scale={validation.guidance_scale}, "
        f"generator=torch.manual_seed({validation.seed})).images[0]",
    ]
    what = f"LoRA of rank {lora.rank} ({lora.target_modules})" if lora else "all weights"
    kept = ", ".join(repr(prompt) for prompt in data.class_prompts)
    prior = f"{data.num_class_images} of {kept}, weight {data.prior_loss_weight}" if data.prior else "none"
    facts = {
        "Base model": base,
        "Trained": what + (", with the text encoder" if train.train_text_encoder else ""),
        "Pictures": f"{pictures}, {data.resolution} pixels",
        "Prior pictures": prior,
        "Steps": f"{train.max_train_steps} of {train.train_batch_size} x {train.gradient_accumulation_steps} pictures",
        "Optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "Seed": config.seed,
        "Reload proof": f"the saved file, loaded into a fresh base, differs by {difference:.1e} (relative L2)",
        "Versions": versions(),
    }
    write(
        config.output_dir,
        header,
        [
            f"Prompt with `{prompt}`." if prompt else "",
            "![samples](samples/final/grid.png)" if validation.prompts else "",
            code(load),
            table(facts),
        ],
    )


def write_model_card(
    config: ScratchConfig, tag: str, use: list[str], pictures: int, figures: dict[str, float | str]
) -> None:
    """README.md of a model from nothing. tag: the Hub's name of its task; use: lines that load it and use it."""
    header = {"library_name": "diffusers", "pipeline_tag": tag, "tags": [config.kind, "diffusion-trainers"]}
    data, train = config.data, config.train
    if data.dataset_name and not Path(data.dataset_name).exists():
        header["datasets"] = [data.dataset_name]
    facts = {
        "Trained": f"{config.kind}, {' '.join(f'{k} {v}' for k, v in config.model.model_dump().items())}",
        "Pictures": f"{pictures}, {data.resolution} pixels, {'grey' if data.channels == 1 else 'colour'}",
        "Steps": f"{train.max_train_steps} of {train.train_batch_size} x {train.gradient_accumulation_steps} pictures",
        "Optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "Seed": config.seed,
        **{f"Held out: {k}": f"{v:.4f}" if isinstance(v, float) else v for k, v in figures.items()},
        "Versions": versions(),
    }
    write(config.output_dir, header, ["![samples](samples/final/grid.png)", code(use), table(facts)])


def write(folder: Path, header: dict, parts: list[str]) -> None:
    text = ["---\n" + yaml.safe_dump(header, sort_keys=False) + "---", f"# {folder.name}", *parts]
    text += ["Made with diffusion-trainers; `config.yaml` holds every setting."]
    (folder / "README.md").write_text("\n\n".join(filter(None, text)) + "\n")


def code(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def table(facts: dict) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items())


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def check_login(config: Config) -> None:
    """Raises: UserError when the run is to be pushed and nobody is logged in."""
    if config.hub.push_to_hub and get_token() is None:
        raise UserError("hub.push_to_hub: not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN")


def push(config: Config) -> str:
    """Upload the run and return its address. Raises: UserError with the command to try again; nothing is lost."""
    folder, name = config.output_dir, config.hub.hub_model_id or config.output_dir.name
    try:
        api = HfApi()
        name = api.create_repo(name, private=config.hub.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=SHARED, commit_message="Add trained weights")
    except Exception as error:
        again = ["hf", "upload", name, str(folder), ".", *(word for p in SHARED for word in ("--include", p))]
        again += ["--private"] if config.hub.private else []
        raise UserError(
            f"the upload to {name} failed ({error}). The run is complete in {folder}. To try again:\n"
            f"  {shlex.join(again)}"
        ) from error
    return f"https://huggingface.co/{name}"
