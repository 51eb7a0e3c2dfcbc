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
    "data.prior=class_images",
    "data.preserve_prompts=[]",
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

    def overrides(self, family: str) -> list[str]:
        return [*self.settings, *self.own.get(family, ())]


def scripts(rate: str) -> Recipe:
    own = {family: (layers,) for family, layers in SCRIPT_LAYERS.items()}
    own["flux"] += ("optimizer.text_encoder_lr=null", "train.train_text_encoder=false")
    return Recipe((*SCRIPTS, f"optimizer.learning_rate={rate}"), own)


# one prompt of the class; the preset, the rate and the way to keep the class are ours
OURS = (
    "lora.target_modules=attention+mlp",
    "optimizer.lr_scheduler=constant",
    "optimizer.lr_warmup_steps=0",
    "data.class_prompt=a photo of a star",
    "data.preserve_prompts=[]",
    "data.prior_loss_weight=1",
)
PICTURES = ("data.prior=class_images", "data.num_class_images=64")
OUTPUTS = ("data.prior=output_preservation", "data.num_class_images=0")
OTHER_THINGS = (
    "data.preserve_prompts=[a photo of a red ball at night, a photo of a blue house on sand, "
    "a photo of a green fish in the sea, a photo of a pink heart on grass]"
)


def ours(rate: str, *settings: str) -> Recipe:
    return Recipe((*OURS, *settings, f"optimizer.learning_rate={rate}"))


RECIPES = {
    "diffusers 5e-4": scripts("5e-4"),
    "diffusers 2e-3": scripts("2e-3"),
    "diffusers 4e-3": scripts("4e-3"),
    "diffusers 8e-3": scripts("8e-3"),
    "class pictures": ours("4e-3", *PICTURES),
    "output preservation": ours("4e-3", *OUTPUTS),
    "and other prompts": ours("4e-3", *OUTPUTS, OTHER_THINGS, "data.prior_loss_weight=2"),
    "the quickstart": Recipe(()),
}
