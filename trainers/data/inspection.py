"""What a run makes of each of its photos: crops, size, caption, and how often it is seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from PIL import ImageStat

from trainers.config import DataConfig
from trainers.data.buckets import BucketRule, Size, enlargement
from trainers.data.crops import Crop, choose_crop
from trainers.data.file_outcomes import FileOutcome
from trainers.data.folders import relative_name
from trainers.data.intake import Intake
from trainers.data.masks import decode_mask
from trainers.data.photo_checks import LARGE_CROP, ROUNDING, CountsTokens
from trainers.data.photo_likeness import find_blurred, find_copies, find_near_copies
from trainers.data.pictures import Picture
from trainers.data.sharpness import SIDE
from trainers.errors import UserError

MAX_VIEWS = 16  # crops of a photo that are told apart


@dataclass(frozen=True)
class Box:
    """A place in a picture, as shares of its sides."""

    left: float
    top: float
    width: float
    height: float

    @property
    def shares(self) -> tuple[float, float]:
        """Its width and height."""
        return self.width, self.height

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(frozen=True)
class View(Box):
    """One crop: its place, and the size that it is trained at, in pixels."""

    size: Size


@dataclass(frozen=True)
class CaptionReading:
    """A caption, the tokens that it has and that are read by each text encoder, and how many of its
    characters all of them read, and at least one."""

    caption: str
    tokens: Mapping[str, tuple[int, int]]
    read_by_all: int
    read_by_some: int

    @property
    def parts(self) -> tuple[str, str, str]:
        """What all text encoders read, what only some do, and what none does."""
        text, whole, some = self.caption, self.read_by_all, self.read_by_some
        return text[:whole], text[whole:some], text[some:]


@dataclass(frozen=True)
class PhotoReport:
    """One photo as a run sees it.

    views: its crops, without those that are alike; enlarged: by how much its sides grow, 1 where
    they do not; cut_off: the share of it that no crop shows, at the least; masked_in: of its mask,
    how much of it is learnt; readings: of its captions, with their tags as they stand; visits: how
    often the run sees it, on average; remarks: what its user may want to change.
    """

    picture: Picture
    name: str
    views: Sequence[View]
    enlarged: float
    cut_off: float
    masked_in: float | None
    readings: Sequence[CaptionReading]
    visits: float
    remarks: Sequence[str]

    @property
    def unseen(self) -> list[Box]:
        """What no crop shows."""
        return find_unseen(self.views)


@dataclass(frozen=True)
class Inspection:
    """All that is known before a run trains.

    photos: those to learn, held out, and of the class, by these names; totals: numbers of the whole
    set, by what they count; files: of the folders.
    """

    intake: Intake
    photos: Mapping[str, Sequence[PhotoReport]]
    files: Sequence[FileOutcome]
    totals: Mapping[str, str | int | float]

    def texts(self, level: str) -> list[str]:
        """Errors, warnings or notes."""
        return [note.text for note in self.intake.notes if note.level == level]


@dataclass(frozen=True)
class Sight:
    """What decides how a run sees photos; tokenizers: where they are at hand."""

    data: DataConfig
    rule: BucketRule
    tokenizers: CountsTokens | None = None

    def describe(
        self, shown: Iterable[Picture], pictures: Sequence[Picture], num_visits: float
    ) -> list[PhotoReport]:
        """Those of `pictures` that are to be shown; num_visits: of all of them together."""
        shown = list(shown)
        total = sum(map(self.rule.weight, pictures))
        alike = describe_likeness(shown)
        reports = []
        for picture in shown:
            views, own = self.views(picture), picture.facts.size
            enlarged = max(enlargement(own, view.size) for view in views)
            cut_off = 1 - max(view.width * view.height for view in views)
            readings = [read_caption(text, self.tokenizers) for text in picture.captions]
            remarks = [*alike.get(picture, []), *self.remarks(picture, enlarged, cut_off)]
            if any(reading.parts[2].strip() for reading in readings):
                remarks.append("no text encoder reads its caption to the end")
            name = short_name(picture, self.data)
            visits = num_visits * self.rule.weight(picture) / total
            extent = enlarged, cut_off, share_masked_in(picture)
            row = PhotoReport(picture, name, views, *extent, readings, visits, remarks)
            reports.append(row)
        return reports

    def views(self, picture: Picture) -> list[View]:
        """The different crops of a picture, MAX_VIEWS at most."""
        views: dict[View, None] = {}
        for size in self.rule.sizes(picture):
            for variant in range(min(self.data.num_variants, MAX_VIEWS)):
                crop = choose_crop(picture, variant, size, self.data)
                views[view_of(crop, picture.facts.size)] = None
        return list(views)[:MAX_VIEWS]

    def remarks(self, picture: Picture, enlarged: float, cut_off: float) -> Iterator[str]:
        """What is said of a picture by itself."""
        if self.rule.is_reduced(picture):
            first = self.rule.resolutions[0]
            yield f"too small for data.resolution={first}, so learnt at a smaller size"
        if enlarged > 1 + ROUNDING:
            yield f"enlarged {enlarged:.2g} times"
        if cut_off > LARGE_CROP:
            yield f"{cut_off:.0%} of it is cut off"
        if picture.facts.storage.has_more_frames:
            yield "of several frames or pages the first is used"


def short_name(picture: Picture, data: DataConfig) -> str:
    """A picture's name within the folder of the config that it lies in."""
    names = [relative_name(picture.name, folder) for folder in data.picture_folders]
    name = min([picture.name, *names], key=len)
    return f"{picture.concept}: {name}" if picture.concept else name


def share_masked_in(picture: Picture) -> float | None:
    """How much of a picture its mask leaves in, the mean of its grays; None without a mask."""
    if picture.mask is None:
        return None
    try:
        return ImageStat.Stat(decode_mask(picture)).mean[0] / 255
    except UserError:
        # it is told among the errors
        return None


def view_of(crop: Crop, picture: Size) -> View:
    """Where a crop lies in a picture of that size."""
    (width, height), (left, top) = crop.box(picture)
    shares = left / width, top / height, crop.width / width, crop.height / height
    return View(*shares, (crop.width, crop.height))


def find_unseen(views: Sequence[Box]) -> list[Box]:
    """What lies in none of the boxes, in boxes that do not overlap."""
    xs = sorted({0.0, 1.0, *(x for view in views for x in (view.left, view.right))})
    ys = sorted({0.0, 1.0, *(y for view in views for y in (view.top, view.bottom))})
    cells = []
    for (left, right), (top, bottom) in product(pairwise(xs), pairwise(ys)):
        x, y = (left + right) / 2, (top + bottom) / 2
        is_seen = any(v.left < x < v.right and v.top < y < v.bottom for v in views)
        if not is_seen:
            cells.append(Box(left, top, right - left, bottom - top))
    return cells


def describe_likeness(pictures: Sequence[Picture]) -> dict[Picture, list[str]]:
    """What is said of pictures that are like others, or blurred."""
    remarks: dict[Picture, list[str]] = {}
    for text, copies in (
        ("the same as", find_copies(pictures)),
        ("nearly the same as", find_near_copies(pictures)),
    ):
        for picture, other in copies.items():
            remarks.setdefault(picture, []).append(f"{text} {other.short_name}")
    for picture in find_blurred(pictures):
        blur = (
            f"blurred: even its sharpest edges, by {picture.facts.edge_blur:.1f} of {SIDE} pixels"
        )
        remarks.setdefault(picture, []).append(blur)
    return remarks


def read_caption(caption: str, tokenizers: CountsTokens | None) -> CaptionReading:
    """How far the text encoders read a caption; all of it where they are not known."""
    tokens, ends = {}, []
    for name in tokenizers.text_encoder_names if tokenizers else ():
        total, limit, rest = tokenizers.count_tokens(name, caption)
        tokens[name] = total, limit
        ends.append(start_of(rest, caption) if total > limit else len(caption))
    ends = ends or [len(caption)]
    return CaptionReading(caption, tokens, min(ends), max(ends))


def start_of(rest: str, caption: str) -> int:
    """Where in a caption the text begins that tokenizers gave back with other spaces and cases."""
    left = len("".join(rest.split()))
    for place in range(len(caption) - 1, -1, -1):
        if left == 0:
            return place + 1
        left -= not caption[place].isspace()
    return 0
