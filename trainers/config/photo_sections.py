"""Where the photos of a DreamBooth run come from: sets of them, each with its prompts and masks."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from trainers.config.base_sections import Section, field
from trainers.config.bounds import Name, NameOrPath, PathField, Prompt

Prompts = Annotated[list[Prompt], Field(max_length=1000)]
NAME = re.compile(r"\w+([ -]\w+)*")
MAX_NAME_BYTES = 200  # disks take 255 for a folder


def check_name(name: str) -> str:
    """The name with its accents in one encoding. Raises: ValueError for what would be no name of a
    folder."""
    name = unicodedata.normalize("NFC", name)
    # many scripts write vowels as marks of letters
    letters = "".join(sign for sign in name if not unicodedata.category(sign).startswith("M"))
    if not NAME.fullmatch(letters):
        raise ValueError("must be letters and digits, with single spaces or dashes between them")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"must have at most {MAX_NAME_BYTES} bytes, for it names a folder")
    return name


ConceptName = Annotated[str, Field(max_length=100), AfterValidator(check_name)]


class PhotoSet(Section):
    """Pictures of one subject, their captions and masks, and what the base must not forget."""

    instance_data_dir: PathField | None = field(
        None, "Folder with the training pictures, in sub-folders too."
    )
    held_out_dir: PathField | None = field(
        None, "Other pictures of the subject, used for evaluation only: held_out_loss."
    )
    dataset_name: NameOrPath | None = field(
        None, "Instead of a folder: a `datasets` Hub name, local folder or .parquet file."
    )
    dataset_split: Name = field("train", "Split of dataset_name.")
    image_column: Name = field("image", "Column of dataset_name that holds the pictures.")
    caption_column: Name | None = field(
        None,
        "Column of dataset_name, metadata.jsonl or metadata.csv with the captions; null: the first "
        "of text, caption and prompt in metadata, none of dataset_name.",
    )
    instance_prompt: Prompt | None = field(
        None, "Caption of every picture that has none of its own."
    )
    class_data_dir: PathField | None = field(
        None, "Folder of class pictures; null means OUTPUT_DIR/class_images."
    )
    class_prompt: Prompt | Prompts | None = field(
        None,
        "What prior preservation protects: 'a photo of a dog', or several prompts that the class "
        "pictures, or the photos with data.prior=output_preservation, take in turn.",
    )
    num_class_images: int = field(
        0,
        "Number of class pictures; the base model generates those that are missing.",
        ge=0,
        le=1_000_000,
    )
    mask_dir: PathField | None = field(
        None,
        "Folder of masks, white where a picture is learnt: 1.png, 1-masklabel.png or 1_mask.png "
        "for 1.jpg. It may be the folder of the pictures.",
    )
    use_alpha_mask: bool = field(
        False, "The alpha channel of a picture without a file in mask_dir is its mask."
    )

    @property
    def source(self) -> Path:
        """Where the pictures come from: a folder, or the name of a data set; empty for neither."""
        return self.instance_data_dir or Path(self.dataset_name or "")

    @property
    def class_prompts(self) -> list[str]:
        """Class picture i shows the prompt i modulo their number."""
        if isinstance(self.class_prompt, str):
            return [self.class_prompt]
        return self.class_prompt or []

    @property
    def has_masks(self) -> bool:
        return self.mask_dir is not None or self.use_alpha_mask


Trigger = Annotated[str, Field(max_length=100)]


class ConceptConfig(PhotoSet):
    """One of several sets of pictures that a run learns from, each a subject of its own."""

    name: ConceptName | None = field(
        None, "How messages, the report and its class pictures call it; null: concept-1, ..."
    )
    trigger: Trigger | None = field(
        None, "The word of this concept, instead of data.trigger, in its captions and prompts."
    )
    repeats: int = field(
        1, "How often each of its pictures counts among those of all concepts.", ge=1, le=1000
    )


Concepts = Annotated[list[ConceptConfig], Field(min_length=1, max_length=1000)]


def concept_name(name: Any, i: int) -> str:
    """What concept i, counted from 0, is called."""
    return name if isinstance(name, str) else f"concept-{i + 1}"
