"""The model card of a run: README.md, which the Hub shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trainers.atomic import write_atomic
from trainers.config import Config, DreamBoothConfig, ScratchConfig
from trainers.data.caption_variants import Wording
from trainers.data.pictures import Picture
from trainers.publishing.best import best_facts
from trainers.publishing.markdown import code_span, escape_markdown, markdown_table
from trainers.publishing.picture_facts import picture_facts
from trainers.publishing.public import is_local, public_config
from trainers.publishing.readers import lora_readers, peft_parts
from trainers.run_folder import CARD_NAME, PIPELINE

PACKAGES = ("diffusion-trainers", "torch", "diffusers", "transformers", "peft", "accelerate")
TEMPLATES = Path(__file__).parent / "templates"

# The licenses that the Hub knows by these ids; others are "other" with a name and a link.
HUB_LICENSES = ("creativeml-openrail-m", "openrail++", "apache-2.0")

STARTS = {"pissa": "PiSSA", "olora": "OLoRA"}

METRICS_HEADING = "## Evaluation"
# The lines of a card's code that name the run's folder or repository.
REPOSITORY_LINES = (
    r'(?m)^(pipe\.load_lora_weights\()"[^"\n]*"(\))$',
    r'(?m)^(\w+ = \w+\.from_pretrained\()"[^"\n]*"(, subfolder="model"\))$',
)

# The last one is that of cards which an earlier version wrote.
KNOWN_METRICS_HEADINGS = (METRICS_HEADING, "## Measured")


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
    config: DreamBoothConfig,
    steps: int,
    difference: float | None,
    pictures: Sequence[Picture],
    initial_lora: str | None = None,
) -> None:
    """Write README.md of the run folder.

    steps: how many were trained; difference: the reload proof's relative difference, None if
    there was none; pictures: those that were learnt, none if they are not at hand;
    initial_lora: the digest of the LoRA from which the training started.
    """
    shared = public_config(config)
    prompt = card_prompt(shared)
    card = ModelCard.from_template(
        dreambooth_metadata(config),
        template_path=str(TEMPLATES / "dreambooth_card.md.jinja"),
        title=escape_markdown(shared.output_dir.name),
        prompt_code=code_span(prompt) if prompt else "",
        has_samples=bool(shared.validation.prompts),
        python=python_values(shared),
        is_lora=config.lora is not None and config.lora.type == "lora",
        peft_parts=peft_parts(shared),
        readers=lora_readers(shared),
        facts=markdown_table(
            {
                **base_facts(shared),
                **initial_facts(config, initial_lora),
                **picture_facts(shared, pictures),
                **training_facts(shared, steps),
                **best_facts(config.output_dir),
                **proof_facts(difference),
                "Versions": versions_line(),
            }
        ),
    )
    write_atomic(config.output_dir / CARD_NAME, str(card))


def card_prompt(config: DreamBoothConfig) -> str:
    """The prompt that shows what was learned; empty where nothing but captions of photos has one.

    Of several subjects it shows the first that has a prompt.
    """
    for photos in config.data.sets:
        if photos.instance_prompt:
            wording = Wording.from_config(config.data, photos.trigger)
            return wording.complete(photos.instance_prompt)
    return next(iter([*config.validation.texts, *config.data.triggers]), "")


def name_repository(folder: Path, repo: str) -> None:
    """Put the repository's name into the code of a run's card, in place of an earlier one."""
    file = folder / CARD_NAME
    text = file.read_text("utf-8")
    for pattern in REPOSITORY_LINES:
        text = re.sub(pattern, lambda found: f'{found[1]}"{repo}"{found[2]}', text)
    write_atomic(file, text)


def dreambooth_metadata(config: DreamBoothConfig) -> ModelCardData:
    """The card's header, by which the Hub finds, licenses and shows the model."""
    base = config.model.pretrained_model_name_or_path
    relation = {}
    # The path of a local base says nothing on the Hub, and it is the user's own affair.
    if not is_local(base):
        relation["base_model"] = base
        relation["base_model_relation"] = "adapter" if config.lora else "finetune"
    tags = ["text-to-image", "diffusers", "diffusers-training", "dreambooth"]
    if config.lora:
        tags += dict.fromkeys(["lora", config.lora.type])
    widget = []
    for i, prompt in enumerate(config.validation.texts):
        widget.append({"text": prompt, "output": {"url": f"samples/final/{i:02d}-0.png"}})
    return ModelCardData(
        **relation,
        **base_license(base, config.facts.licenses),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # the Hub shows it as what triggers the model
        instance_prompt=", ".join(config.data.triggers) or card_prompt(config),
        tags=tags,
        widget=widget,
    )


def python_values(config: DreamBoothConfig) -> dict[str, Any]:
    """The values of the example code, those that are text as Python literals."""
    validation = config.validation
    base = config.model.pretrained_model_name_or_path
    return {
        "base": repr(base if config.lora else f"PATH_OR_REPO/{PIPELINE}"),
        "prompt": repr(card_prompt(config)),
        "size": config.data.max_resolution,
        "max_sequence_length": config.model.max_sequence_length,
        "num_inference_steps": validation.num_inference_steps,
        "guidance_scale": validation.guidance_scale,
        "seed": validation.seed,
    }


def base_facts(config: DreamBoothConfig) -> dict[str, object]:
    """What was trained, for the card's table."""
    lora = config.lora
    trained = f"{lora.title} ({lora.target_modules})" if lora else "all weights"
    if lora and lora.init_lora_weights in STARTS:
        trained += f", started by {STARTS[lora.init_lora_weights]}: its file has twice the rank"
    if config.train.train_text_encoder:
        trained += ", with the text encoder"
    facts = {"Base model": config.model.pretrained_model_name_or_path, "Trained": trained}
    if config.model.clip_chunks > 1:
        facts["Prompts"] = (
            f"CLIP reads them in {config.model.clip_chunks} chunks of 75 tokens: use a program for "
            "long prompts, such as ComfyUI, A1111 or Forge; the code above cuts them at 77 tokens"
        )
    return facts


def initial_facts(config: DreamBoothConfig, digest: str | None) -> dict[str, object]:
    """The LoRA that the training started from, if any; the name of a local one is the user's."""
    if digest is None:
        return {}
    source = config.lora.init_from
    name = "a LoRA that is not public" if is_local(source) else source
    return {"Started from": f"{name}; sha256 {digest[:16]}"}


def proof_facts(difference: float | None) -> dict[str, object]:
    """The reload proof, if there was one, for the card's table."""
    if difference is None:
        return {}
    proof = f"the saved file, loaded into a fresh base, differs by {difference:.1e} (relative L2)"
    return {"Reload proof": proof}


def training_facts(config: Config, steps: int) -> dict[str, object]:
    """How a run of any kind trained, for the card's table."""
    train, optimizer = config.train, config.optimizer
    batch = f"{train.train_batch_size} x {train.gradient_accumulation_steps}"
    ratio = optimizer.lora_plus_ratio
    fast = "" if ratio is None else f", of lora_B {ratio:g} times that"
    return {
        "Steps": f"{steps} of {batch} pictures",
        "Precision": {"no": "float32"}.get(train.mixed_precision, train.mixed_precision),
        "Optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}{fast}",
        "Seed": config.seed,
    }


def add_metrics(folder: Path, metrics: Mapping[str, float | str]) -> None:
    """Put the results of an evaluation at the end of a run's card, in place of earlier ones."""
    file = folder / CARD_NAME
    text = file.read_text("utf-8")
    for heading in KNOWN_METRICS_HEADINGS:
        text = text.partition(f"\n{heading}\n")[0]
    table = markdown_table(format_metrics(metrics))
    write_atomic(file, f"{text.rstrip()}\n\n{METRICS_HEADING}\n\n{table}\n")


def format_metrics(metrics: Mapping[str, float | str]) -> dict[str, str]:
    formatted = {}
    for name, value in metrics.items():
        formatted[name] = f"{value:.4f}" if isinstance(value, float) else str(value)
    return formatted


def write_scratch_card(  # noqa: PLR0913 (what the card tells)
    config: ScratchConfig,
    steps: int,
    tag: str,
    usage: Sequence[str],
    pictures: int,
    metrics: Mapping[str, float | str],
) -> None:
    """Write README.md of a model that was trained from scratch.

    tag: the Hub's name of its task; usage: lines of code that load the model and call it.
    """
    data = config.data
    is_on_hub = data.dataset_name and not is_local(data.dataset_name)
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=tag,
        tags=[config.kind, "diffusion-trainers"],
        datasets=[data.dataset_name] if is_on_hub else None,
    )
    model = " ".join(f"{key} {value}" for key, value in config.model.model_dump().items())
    color = "gray" if data.channels == 1 else "color"
    facts = {
        "Trained": f"{config.kind}, {model}",
        "Pictures": f"{pictures}, {data.resolution} pixels, {color}",
        **training_facts(config, steps),
        **best_facts(config.output_dir),
        **{f"Held out: {name}": value for name, value in format_metrics(metrics).items()},
        "Versions": versions_line(),
    }
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATES / "scratch_card.md.jinja"),
        title=escape_markdown(public_config(config).output_dir.name),
        usage="\n".join(usage),
        facts=markdown_table(facts),
    )
    write_atomic(config.output_dir / CARD_NAME, str(card))


def package_versions() -> dict[str, str]:
    """The version of each package that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # a checkout runs without being installed
            found[name] = "not installed"
    return found


def versions_line() -> str:
    return ", ".join(f"{name} {number}" for name, number in package_versions().items())
