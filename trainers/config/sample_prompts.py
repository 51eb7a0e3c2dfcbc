"""Prompts to sample: a text, or a text with settings of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from trainers.config.base_sections import Section, field
from trainers.config.bounds import Guidance, Pixels, Prompt, Seed

# how many megabytes a picture takes grows with its pixels
Side = Annotated[Pixels, Field(ge=8)]


class SamplePrompt(Section):
    """A prompt with its own settings; null means those of all prompts."""

    prompt: Prompt = field("", "The text; it has to be set.")
    negative_prompt: Prompt | None = field(None, "Its negative prompt.")
    seed: Seed | None = field(None, "Its picture i starts from the noise of seed + i.")
    size: Side | None = field(None, "Its width and height in pixels, instead of the two keys.")
    width: Side | None = field(None, "Its width in pixels.")
    height: Side | None = field(None, "Its height in pixels.")
    num_inference_steps: int | None = field(None, "Its sampler steps.", ge=1, le=1000)
    guidance_scale: Guidance | None = field(None, "Its classifier-free guidance.")
    lora_scale: float | None = field(None, "Strength of the LoRA in it; null: 1.", ge=-10, le=10)

    def sides(self, default: int) -> tuple[int, int]:
        """Width and height; default: of what says nothing."""
        side = self.size or default
        return self.width or side, self.height or side

    @property
    def caption(self) -> str:
        """The text with the settings that are its own."""
        given = self.model_dump(exclude={"prompt"}, exclude_none=True).items()
        own = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given)
        return f"{self.prompt} ({own})" if own else self.prompt


def item_tag(value: Any) -> str:
    return "settings" if isinstance(value, (dict, Section)) else "text"


ITEM_TAGS = ("settings", "text")
PromptItem = Annotated[
    Annotated[Prompt, Tag("text")] | Annotated[SamplePrompt, Tag("settings")],
    Discriminator(item_tag),
]
PromptItems = Annotated[list[PromptItem], Field(max_length=1000)]


def as_settings(items: Iterable[str | SamplePrompt]) -> list[SamplePrompt]:
    return [SamplePrompt(prompt=item) if isinstance(item, str) else item for item in items]
