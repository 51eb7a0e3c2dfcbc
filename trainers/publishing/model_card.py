"""The model card."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from trainers.config import DreamBoothConfig, ScratchConfig
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

PACKAGES = ("diffusion-trainers", "torch", "diffusers", "transformers", "peft", "accelerate")


LICENSES = {  # of bases, by owner and the beginning of the name: the Hub's id, or a name of its own
    "stable-diffusion-v1-5/": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-3": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}


MEASURED = "## Measured"


def license_of(base: str) -> dict[str, str]:
    """What the LoRA inherits; {} for a base that is not known."""
    name = next((name for beginning, name in LICENSES.items() if base.startswith(beginning)), None)
    if name in ("creativeml-openrail-m", "apache-2.0", None):
        return {"license": name} if name else {}
    link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": name, "license_link": link}


def write_card(config: DreamBoothConfig, difference: float, pictures: Sequence[str]) -> None:
    """README.md of the run folder. difference: the reload proof's figure; pictures: digests of those learnt from."""
    base, lora, train = config.model.pretrained_model_name_or_path, config.lora, config.train
    data, validation = config.data, config.validation
    public = not Path(base).exists()
    prompt = data.instance_prompt or next(iter(validation.prompts), "")
    header = {
        **({"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if public else {}),
        **license_of(base),
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
        "Pictures": f"{len(pictures)}, {size} pixels; sha256 {sha256(''.join(pictures).encode()).hexdigest()[:16]}",
        "Prior pictures": prior,
        "Steps": f"{train.max_train_steps} of {train.train_batch_size} x {train.gradient_accumulation_steps} pictures",
        "Optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "Seed": config.seed,
        "Reload proof": f"the saved file, loaded into a fresh base, differs by {difference:.1e} (relative L2)",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    write(
        config.output_dir,
        header,
        [
            f"Prompt with `{prompt}`." if prompt else "",
            "![samples](samples/final/grid.png)" if validation.prompts else "",
            code(load),
            comfyui(config) if lora else "",
            table(facts),
        ],
    )


def comfyui(config: DreamBoothConfig) -> str:
    file = KOHYA_NAME if config.kohya else WEIGHT_NAME
    where = "" if config.model.family != "sd15" else "; A1111 and Forge take the same file"
    return f"ComfyUI: put `{file}` into `models/loras` and choose it in a *Load LoRA* node, strength 1{where}."


def add_figures(folder: Path, figures: dict[str, float | str]) -> None:
    """Put what was measured afterwards at the end of a run's card, in place of what was measured before."""
    file = folder / "README.md"
    text = file.read_text().partition(MEASURED)[0].rstrip()
    file.write_text(f"{text}\n\n{MEASURED}\n\n{table(shown(figures))}\n")


def shown(figures: dict[str, float | str]) -> dict[str, str]:
    return {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in figures.items()}


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
        **{f"Held out: {name}": value for name, value in shown(figures).items()},
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
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


def versions() -> dict[str, str]:
    """Of the packages that a result depends on; a checkout runs without being installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
