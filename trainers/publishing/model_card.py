"""The model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from trainers.config import DreamBoothConfig, ScratchConfig
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

PACKAGES = ("diffusion-trainers", "torch", "diffusers", "transformers", "peft", "accelerate")


HUB_LICENSES = ("creativeml-openrail-m", "apache-2.0")  # which the Hub knows by these ids
METRICS_HEADING = "## Measured"


def base_license(base: str, licenses: Mapping[str, str]) -> dict[str, str]:
    """The license of a base model, which its LoRA inherits; {} for a base that is not known.

    licenses: by the beginnings of the names of a family's bases.
    """
    name = next((name for prefix, name in licenses.items() if base.startswith(prefix)), None)
    if name is None:
        return {}
    if name in HUB_LICENSES:
        return {"license": name}
    link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": name, "license_link": link}


def write_dreambooth_card(
    config: DreamBoothConfig, difference: float, pictures: Sequence[str]
) -> None:
    """README.md of the run folder. difference: the reload proof's figure; pictures: digests of
    those learnt from."""
    base, lora, train = config.model.pretrained_model_name_or_path, config.lora, config.train
    data, validation = config.data, config.validation
    public = not Path(base).exists()
    prompt = data.instance_prompt or next(iter(validation.prompts), "")
    header = {
        **(
            {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
            if public
            else {}
        ),
        **base_license(base, config.facts.licenses),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": prompt,
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "dreambooth",
            *(["lora"] if lora else []),
        ],
        "widget": [
            {"text": p, "output": {"url": f"samples/final/{i:02d}-0.png"}}
            for i, p in enumerate(validation.prompts)
        ],
    }
    size, length = data.resolution, config.model.max_sequence_length
    load = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base if lora else "PATH_OR_REPO/pipeline"}")',
        *(['pipe.load_lora_weights("PATH_OR_REPO")'] if lora else []),
        f"image = pipe({prompt!r}, height={size}, width={size}, "
        f"{f'max_sequence_length={length}, ' if length else ''}"
        f"num_inference_steps={validation.num_inference_steps}, "
        f"guidance_scale={validation.guidance_scale}, "
        f"generator=torch.manual_seed({validation.seed})).images[0]",
    ]
    trained = f"LoRA of rank {lora.rank} ({lora.target_modules})" if lora else "all weights"
    class_prompts = ", ".join(repr(prompt) for prompt in data.class_prompts)
    prior = (
        f"{data.num_class_images} of {class_prompts}, weight {data.prior_loss_weight}"
        if data.uses_prior
        else "none"
    )
    facts = {
        "Base model": base,
        "Trained": trained + (", with the text encoder" if train.train_text_encoder else ""),
        "Pictures": f"{len(pictures)}, {size} pixels; sha256 "
        f"{sha256(''.join(pictures).encode()).hexdigest()[:16]}",
        "Prior pictures": prior,
        "Steps": f"{train.max_train_steps} of {train.train_batch_size} x "
        f"{train.gradient_accumulation_steps} pictures",
        "Optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "Seed": config.seed,
        "Reload proof": f"the saved file, loaded into a fresh base, differs by {difference:.1e} "
        f"(relative L2)",
        "Versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
    }
    write_readme(
        config.output_dir,
        header,
        [
            f"Prompt with `{prompt}`." if prompt else "",
            "![samples](samples/final/grid.png)" if validation.prompts else "",
            code_block(load),
            comfyui_hint(config) if lora else "",
            markdown_table(facts),
        ],
    )


def comfyui_hint(config: DreamBoothConfig) -> str:
    file = KOHYA_NAME if config.writes_kohya else WEIGHT_NAME
    readers = config.facts.readers
    other_readers = f"; {readers}" if readers else ""
    return (
        f"ComfyUI: put `{file}` into `models/loras` and choose it in a *Load LoRA* node, "
        f"strength 1{other_readers}."
    )


def add_metrics(folder: Path, metrics: dict[str, float | str]) -> None:
    """Put what was measured afterwards at the end of a run's card, in place of what was measured
    before."""
    file = folder / "README.md"
    text = file.read_text().partition(METRICS_HEADING)[0].rstrip()
    file.write_text(f"{text}\n\n{METRICS_HEADING}\n\n{markdown_table(format_metrics(metrics))}\n")


def format_metrics(metrics: dict[str, float | str]) -> dict[str, str]:
    return {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in metrics.items()
    }


def write_scratch_card(
    config: ScratchConfig,
    tag: str,
    usage: list[str],
    pictures: int,
    metrics: dict[str, float | str],
) -> None:
    """README.md of a model from nothing. tag: the Hub's name of its task; usage: lines that load it
    and use it."""
    header = {
        "library_name": "diffusers",
        "pipeline_tag": tag,
        "tags": [config.kind, "diffusion-trainers"],
    }
    data, train = config.data, config.train
    if data.dataset_name and not Path(data.dataset_name).exists():
        header["datasets"] = [data.dataset_name]
    facts = {
        "Trained": f"{config.kind}, "
        f"{' '.join(f'{k} {v}' for k, v in config.model.model_dump().items())}",
        "Pictures": f"{pictures}, {data.resolution} pixels, "
        f"{'grey' if data.channels == 1 else 'colour'}",
        "Steps": f"{train.max_train_steps} of {train.train_batch_size} x "
        f"{train.gradient_accumulation_steps} pictures",
        "Optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "Seed": config.seed,
        **{f"Held out: {name}": value for name, value in format_metrics(metrics).items()},
        "Versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
    }
    write_readme(
        config.output_dir,
        header,
        ["![samples](samples/final/grid.png)", code_block(usage), markdown_table(facts)],
    )


def write_readme(folder: Path, header: dict, parts: list[str]) -> None:
    text = ["---\n" + yaml.safe_dump(header, sort_keys=False) + "---", f"# {folder.name}", *parts]
    text += ["Made with diffusion-trainers; `config.yaml` holds every setting."]
    (folder / "README.md").write_text("\n\n".join(filter(None, text)) + "\n")


def code_block(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def markdown_table(facts: dict) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items())


def package_versions() -> dict[str, str]:
    """Of the packages that a result depends on; a checkout runs without being installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
