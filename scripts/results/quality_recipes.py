"""The recipes that quality.py compares, as overrides of the quickstarts' configs."""

from dataclasses import dataclass, field

CONFIGS = {
    "sd15": "configs/quickstart.yaml",
    "sd3": "configs/quickstart_sd35.yaml",
    "flux": "configs/quickstart_flux.yaml",
}

# of examples/dreambooth/train_dreambooth_lora*.py: layers, rank 4, constant rate, a batch of 4,
# one class prompt, 100 class pictures, times drawn one by one, and no text encoder
SCRIPTS = (
    "lora.rank=4",
    "optimizer.lr_scheduler=constant",
    "optimizer.lr_warmup_steps=0",
    "data.class_prompt=a photo of a star",
    "data.num_class_images=100",
    "data.prior_loss_weight=1",
    "objective.stratified=false",
    "train.train_batch_size=4",
)
# Flux.1's script trains the MLPs of the double blocks too
SCRIPT_LAYERS = {
    "sd15": "lora.target_modules=attention",
    "sd3": "lora.target_modules=attention",
    "flux": "lora.target_modules=attention+mlp",
}


@dataclass(frozen=True)
class Recipe:
    """Settings for all families, and those that differ."""

    settings: tuple[str, ...]
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(CONFIGS)

    def overrides(self, family: str) -> list[str]:
        return [*self.settings, *self.own.get(family, ())]


def scripts(rate: str) -> Recipe:
    own = {family: (layers,) for family, layers in SCRIPT_LAYERS.items()}
    own["flux"] += ("optimizer.text_encoder_lr=null", "train.train_text_encoder=false")
    return Recipe((*SCRIPTS, f"optimizer.learning_rate={rate}"), own)


OURS = (
    "optimizer.lr_warmup_steps=0",
    "lora.target_modules=attention+mlp",
    "optimizer.lr_scheduler=constant",
    "data.class_prompt=a photo of a star",
    "data.num_class_images=0",
    "data.prior=output_preservation",
    "data.prior_loss_weight=1",
)

OTHER_THINGS = (
    "data.preserve_prompts=[a photo of a red ball at night, a photo of a blue house on sand, "
    "a photo of a green fish in the sea, a photo of a pink heart on grass]"
)

RECIPES = {
    "op 4e-3": Recipe((*OURS, "optimizer.learning_rate=4e-3")),
    "op+others 4e-3": Recipe((*OURS, "optimizer.learning_rate=4e-3", OTHER_THINGS)),
    "op+others 8e-3": Recipe((*OURS, "optimizer.learning_rate=8e-3", OTHER_THINGS)),
    "op 8e-3": Recipe((*OURS, "optimizer.learning_rate=8e-3")),
    "op+others 4e-3 w2": Recipe(
        (*OURS, "optimizer.learning_rate=4e-3", OTHER_THINGS, "data.prior_loss_weight=2")
    ),
    "diffusers 5e-4": scripts("5e-4"),
    "diffusers 2e-3": scripts("2e-3"),
    "diffusers 4e-3": scripts("4e-3"),
    "diffusers 8e-3": scripts("8e-3"),
    "diffusers 16e-3": scripts("16e-3"),
}
