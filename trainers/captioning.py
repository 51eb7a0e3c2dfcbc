"""Captions that a vision-language model writes for the photos of a folder, as text files beside
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from trainers.atomic import write_atomic
from trainers.data.captions import PictureIndex, read_captions
from trainers.data.folders import FolderContents, relative_name, scan_folder
from trainers.data.masks import named_as_masks
from trainers.data.pictures import picture_from_file
from trainers.distributed.accelerator import best_device
from trainers.errors import UserError
from trainers.progress import track

TASK = "image-text-to-text"
CHAT_PROMPT = "Describe this picture in one sentence."
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class CaptionSettings:
    """prompt: what the model is asked, where it is not to use its own; prefix: before each caption;
    suffix: of the files; overwrite: captions that are there too."""

    prompt: str | None = None
    prefix: str = ""
    suffix: str = ".txt"
    batch_size: int = 4
    overwrite: bool = False


@dataclass(frozen=True)
class Captioned:
    """How many pictures got a caption and had one before, why others have none, and how many were
    passed over as the masks of others."""

    num_written: int
    num_kept: int
    failures: Sequence[str]
    num_masks: int = 0


class Captioner:
    """A model that writes captions."""

    def __init__(self, model: str, prompt: str | None) -> None:
        """model: a repository of the Hub or a folder. Raises: UserError where it cannot be loaded,
        or writes no captions."""
        self.pipe = load_pipeline(model)
        self.is_chat = bool(self.pipe.processor.chat_template)
        self.prompt = prompt if prompt is not None else (CHAT_PROMPT if self.is_chat else "")

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption for each picture, in one line; empty where the model gave no words."""
        options: dict[str, Any] = {"return_full_text": False, "max_new_tokens": MAX_NEW_TOKENS}
        if self.is_chat:
            results = self.pipe(text=[self.question(image) for image in images], **options)
            # a list for each question
            records = [result[0] if isinstance(result, list) else result for result in results]
        else:
            prompts = [self.prompt] * len(images)
            records = self.pipe(images=list(images), text=prompts, **options)
        return [" ".join(record["generated_text"].split()) for record in records]

    def question(self, image: Image.Image) -> list[dict]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]


def load_pipeline(model: str) -> transformers.Pipeline:
    device = best_device()
    try:
        return transformers.pipeline(
            TASK,
            model=model,
            device=device,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # of the Hub, of the network, of files that are of something else
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model: {model} cannot be loaded as a model that writes captions ({reason}). It "
            f"must be one of transformers' {TASK} models with safetensors, by its name on the Hub "
            "or as a local folder; when offline, a local folder"
        ) from None


def caption_folder(folder: Path, model: str, settings: CaptionSettings) -> Captioned:
    """Write the captions that are missing, each file as soon as its caption is known.

    So what was stopped goes on where it was. Raises: UserError for no such folder, one without
    pictures, with broken captions, or for the model.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    contents = scan_folder(folder)
    # a caption beside a mask would belong to no picture
    masks = set(named_as_masks(contents))
    contents.pictures = [path for path in contents.pictures if path not in masks]
    if not contents.pictures:
        raise UserError(f"{folder} holds no pictures")
    sources = read_captions(contents).sources
    pending = [path for path in contents.pictures if settings.overwrite or path not in sources]
    num_kept = len(contents.pictures) - len(pending)
    if not pending:
        return Captioned(0, num_kept, [], len(masks))
    captioner = Captioner(model, settings.prompt)
    places = caption_files(pending, contents, sources, settings.suffix)
    num_written, failures = 0, []
    for batch in batches(pending, settings.batch_size, failures):
        images = [image for _, image in batch]
        for (path, _), caption in zip(batch, captioner(images), strict=True):
            if not caption:
                failures.append(f"{relative_name(path, folder)}: the model gave no words")
                continue
            write_atomic(places[path], f"{settings.prefix}{caption}\n")
            num_written += 1
    return Captioned(num_written, num_kept, failures, len(masks))


def batches(
    paths: Sequence[Path], size: int, failures: list[str]
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """The decoded pictures; what cannot be read is added to the failures."""
    batch: list[tuple[Path, Image.Image]] = []
    for path in track(paths, "captions"):
        try:
            batch.append((path, picture_from_file(path).decode()))
        except UserError as error:
            failures.append(str(error))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def caption_files(
    pending: Sequence[Path], contents: FolderContents, sources: dict[Path, Path], suffix: str
) -> dict[Path, Path]:
    """Where each caption is written: the text file that its picture has, or one of its name."""
    index, files = PictureIndex(contents), {}
    for picture in pending:
        source = sources.get(picture)
        stem = relative_name(picture.with_suffix(""), contents.root)
        if source is not None and source not in contents.metadata:
            files[picture] = source
        elif len(index.with_stem(stem)) == 1:
            files[picture] = picture.with_suffix(suffix)
        else:
            # 1.jpg.txt where 1.png would have 1.txt too
            files[picture] = Path(f"{picture}{suffix}")
    return files
