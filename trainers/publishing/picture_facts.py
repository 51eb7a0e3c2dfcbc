"""What a card tells about the pictures that were learnt."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from trainers.config import DreamBoothConfig
from trainers.data.buckets import BucketRule, concept_shares
from trainers.data.pictures import Picture


def picture_facts(config: DreamBoothConfig, pictures: Sequence[Picture]) -> dict[str, object]:
    """What was trained on, for the card's table; pictures: those, if they are at hand."""
    data = config.data
    facts = {}
    if pictures:
        sides = " and ".join(str(side) for side in data.resolutions)
        digest = sha256("".join(p.digest for p in pictures).encode()).hexdigest()[:16]
        facts["Pictures"] = f"{len(pictures)}, {sides} pixels; sha256 {digest}"
    if data.concepts is not None:
        facts |= concept_facts(config, pictures)
    if data.has_masks:
        facts["Masks"] = f"what they leave out counts {data.mask_floor:g}"
    facts["Prior pictures"] = "none"
    if data.preserves_outputs:
        prompts = ", ".join(repr(prompt) for prompt in data.kept_prompts)
        kept = f"the base's own outputs on the pictures for {prompts}"
        facts["Prior pictures"] = f"none; {kept}, weight {data.prior_loss_weight}"
    elif data.class_sets:
        number = sum(photos.num_class_images for photos, _ in data.class_sets)
        prompts = ", ".join(repr(prompt) for prompt in data.class_prompts)
        prior = f"{number} of {prompts}, weight {data.prior_loss_weight}"
        facts["Prior pictures"] = prior
    return facts


def concept_facts(config: DreamBoothConfig, pictures: Sequence[Picture]) -> dict[str, object]:
    """The prompt of each concept and, where its pictures are at hand, their number and share."""
    facts = {}
    shares = concept_shares(pictures, BucketRule.from_config(config))
    for concept in config.data.sets:
        texts = ["prompted by captions"]
        if concept.instance_prompt:
            texts = [f"prompted by {concept.instance_prompt!r}"]
        if concept.name in shares:
            number = sum(picture.concept == concept.name for picture in pictures)
            texts.append(f"{number} pictures, {shares[concept.name]:.0%} of what was learnt")
        facts[f"Concept {concept.name}"] = "; ".join(texts)
    return facts
