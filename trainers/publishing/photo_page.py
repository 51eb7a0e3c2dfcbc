"""The photos of a run on one page, and as text, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from trainers.atomic import write_atomic
from trainers.config import DreamBoothConfig
from trainers.data.buckets import BucketRule, name_size
from trainers.data.inspection import Inspection, PhotoReport, Sight
from trainers.data.intake import Intake
from trainers.data.masks import decode_mask
from trainers.data.photo_sets import list_instance_pictures
from trainers.data.pictures import Picture
from trainers.data.rng import choose_rows
from trainers.errors import UserError
from trainers.publishing.embedding import (
    MAX_TRAINING_PICTURES,
    EmbeddedPicture,
    embed_image,
    embed_picture,
)
from trainers.publishing.html import environment, parts

THUMBNAIL = 360  # pixels
VEIL, VEIL_OPACITY = (190, 30, 90), 0.65
MAX_CARDS = 300
HEADINGS = {"error": "Errors", "warning": "Warnings", "note": "Notes"}


@dataclass(frozen=True)
class Card:
    """A photo's report and its picture, which is gone where the file has changed meanwhile."""

    report: PhotoReport
    picture: EmbeddedPicture | None


def write_photo_page(inspection: Inspection, config: DreamBoothConfig, out: Path) -> Path:
    """Write one HTML file that needs nothing else, and return its path."""
    sections: dict[str, Markup] = {"": parts.tiles(inspection.totals, "")}
    for level, heading in HEADINGS.items():
        sections[heading] = parts.messages(inspection.texts(level), level)
    for name, reports in inspection.photos.items():
        sections[f"Photos {name}"] = photo_cards(reports)
    sections["Files"] = parts.file_table(inspection.files)
    page = environment.get_template("photos.html.jinja").render(
        title=", ".join(photos.source.name for photos in config.data.sets),
        kind="photos before the training",
        sections=sections,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return out


def photo_cards(reports: Sequence[PhotoReport]) -> Markup:
    """The photos with their crops; of a large set, those with remarks first of all."""
    chosen = sorted(range(len(reports)), key=lambda i: (not reports[i].remarks, i))[:MAX_CARDS]
    cards = []
    for i in sorted(chosen):
        cards.append(Card(reports[i], embed_photo(reports[i].picture)))
    return parts.photo_cards(cards, len(reports))


def training_photos(config: DreamBoothConfig, num_visits: float) -> Markup:
    """Photos of a run with their crops and captions, drawn at random where there are many.

    num_visits: how many photos its steps have seen; each of a part of them is said to have seen its
    share. There are none where their folder or local data set is gone or empty, or where they are
    on the Hub.
    """
    data = config.data
    if not all(photos.source.name and photos.source.exists() for photos in data.sets):
        return Markup()
    intake = Intake(keeps_going=True)
    pictures = intake.attempt(lambda: list_instance_pictures(data, intake), [])
    if not pictures:
        return Markup()
    chosen = choose_rows(0, len(pictures), MAX_TRAINING_PICTURES)
    rule = BucketRule.from_config(config)
    shown = [pictures[i] for i in chosen if is_usable(pictures[i], rule)]
    # all may be many, and their sizes are not known before they are decoded
    reports = Sight(data, rule).describe(shown, shown, num_visits * len(shown) / len(pictures))
    cards = []
    for report in reports:
        cards.append(Card(report, embed_photo(report.picture)))
    return parts.photo_cards(cards, len(pictures))


def embed_photo(picture: Picture) -> EmbeddedPicture | None:
    """The photo, with a veil over what its mask leaves out; None where it cannot be read."""
    if picture.mask is None:
        return embed_picture(picture, THUMBNAIL)
    try:
        image, mask = picture.decode(), decode_mask(picture)
    except UserError:
        return embed_picture(picture, THUMBNAIL)
    veiled = Image.blend(image, Image.new("RGB", image.size, VEIL), VEIL_OPACITY)
    return embed_image(Image.composite(image, veiled, mask), THUMBNAIL)


def is_usable(picture: Picture, rule: BucketRule) -> bool:
    try:
        return bool(rule.sizes(picture) and picture.facts)
    except UserError:
        return False


def describe_as_text(inspection: Inspection) -> str:
    """What the page says, for a terminal."""
    lines = [f"{name}: {value}" for name, value in inspection.totals.items()]
    for name, reports in inspection.photos.items():
        if reports:
            lines += ["", f"photos {name}"]
            lines += [f"  {describe_photo(report)}" for report in reports]
    for level in HEADINGS:
        texts = inspection.texts(level)
        lines += [""] * bool(texts) + [f"{level}: {text}" for text in texts]
    return "\n".join(lines)


def describe_photo(report: PhotoReport) -> str:
    return "; ".join(photo_facts(report))


def photo_facts(report: PhotoReport) -> Iterator[str]:
    sizes = {view.size: None for view in report.views}
    stored = name_size(report.picture.facts.size)
    yield f"{report.name}: {stored} as {', '.join(map(name_size, sizes))}"
    if report.cut_off >= 0.005:
        yield f"{report.cut_off:.0%} cut off"
    if report.masked_in is not None:
        yield f"{report.masked_in:.0%} within the mask"
    if report.visits:
        yield f"seen {report.visits:.3g} times"
    for reading in report.readings:
        counts = [f"{total}/{limit}" for total, limit in reading.tokens.values()]
        if counts:
            yield f"tokens {', '.join(counts)}"
    if report.remarks:
        yield f"! {', '.join(report.remarks)}"
