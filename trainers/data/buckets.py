"""The sizes that pictures are trained at: one area, and sides as theirs (aspect buckets).

A picture is never distorted: it is resized as a whole and what stands over is cut off. Of the
sizes, each picture has the one that cuts the least off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from trainers.config import DreamBoothConfig
from trainers.data.pictures import Picture
from trainers.errors import UserError

Size = tuple[int, int]  # width and height in pixels

MAX_ASPECT = 4  # of the longer side to the shorter
STEPS_PER_SIDE = 16  # sides differ by a part of the square's side, or by what the model can take
MAX_STEP = 64
MAX_FACTOR = 20  # of class pictures that are repeated to balance concepts
SHARE_TOLERANCE = 0.02  # of a concept's share, up to which the smallest factors will do
# a picture that must not be enlarged so far is trained at the first of these shares that suits it
SMALLER_AREAS = (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2)


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, multiple: int, max_side: int | None = None) -> tuple[Size, ...]:
    """All sizes with about the pixels of a square of `resolution`, and never more than those.

    multiple: by which the model's sides can be divided; max_side: how long they may be. The square
    is always among the sizes.
    """
    step = min(max(resolution // STEPS_PER_SIDE // multiple, 1) * multiple, MAX_STEP)
    sizes = {(resolution, resolution)}
    long = resolution + step
    while long <= min(resolution**2 // step, max_side or MAX_ASPECT * resolution):
        short = resolution**2 // long // step * step
        if long > MAX_ASPECT * short:
            break
        sizes |= {(long, short), (short, long)}
        long += step
    return tuple(sorted(sizes))


def name_size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def enlargement(picture: Size, size: Size) -> float:
    """By what a picture's sides are multiplied so that it just covers `size`."""
    return max(size[0] / picture[0], size[1] / picture[1])


def share_cut_off(picture: Size, size: Size) -> float:
    """The share of a picture's pixels outside of a crop of `size`."""
    scale = enlargement(picture, size)
    return 1 - size[0] * size[1] / (scale**2 * picture[0] * picture[1])


def least_cropped(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size that cuts the least off a picture, the larger one of two that are alike."""
    return min(sizes, key=lambda size: (share_cut_off(picture, size), -size[0] * size[1], size))


# asked for often, and the pictures of one camera have few sizes
@lru_cache(maxsize=65536)
def bucket_size(picture: Size, resolution: int, multiple: int, max_side: int | None) -> Size:
    """The least cropped of `bucket_sizes`."""
    return least_cropped(picture, bucket_sizes(resolution, multiple, max_side))


@dataclass(frozen=True)
class BucketRule:
    """How a picture's sizes follow from its own.

    resolutions: sides of the squares whose areas are trained; multiple: by which the model's sides
    can be divided; max_upscale: how far a picture may be enlarged; enabled: whether other shapes
    than squares are trained; max_side: the model's longest side, if it has one.
    """

    resolutions: tuple[int, ...]
    multiple: int = 8
    max_upscale: float = 2.0
    enabled: bool = True
    max_side: int | None = None

    @classmethod
    def from_config(cls, config: DreamBoothConfig, max_side: int | None = None) -> BucketRule:
        """Raises: UserError where the model cannot take the largest square."""
        data, multiple = config.data, config.facts.pixel_multiple
        resolutions = tuple(data.resolutions)
        if max_side and resolutions[-1] > max_side:
            raise UserError(
                f"data.resolution: {resolutions[-1]} is more than the {max_side} pixels of the "
                "longest side that this base can take: set it to that at most"
            )
        return cls(resolutions, multiple, data.max_upscale, data.buckets, max_side)

    def sizes(self, picture: Picture) -> list[Size]:
        """The size of a picture for each area that it is large enough for, the smallest first.

        Raises: UserError for one that is too small for all of them.
        """
        if not self.enabled:
            return [(side, side) for side in self.resolutions]
        own = picture.facts.size
        fitting = [self.best_size(own, side) for side in self.resolutions]
        fitting = [size for size in fitting if enlargement(own, size) <= self.max_upscale]
        return fitting or [self.smaller_size(picture)]

    def weight(self, picture: Picture) -> int:
        """How often a picture counts among the others: at each of its sizes."""
        return picture.repeats * len(self.sizes(picture))

    def best_size(self, picture: Size, resolution: int) -> Size:
        return bucket_size(picture, resolution, self.multiple, self.max_side)

    def is_reduced(self, picture: Picture) -> bool:
        """Whether a picture is too small for each area, and so has a smaller one."""
        first = self.resolutions[0]
        return self.enabled and self.sizes(picture)[0] != self.best_size(picture.facts.size, first)

    def smaller_size(self, picture: Picture) -> Size:
        """The size of a picture that would be enlarged too far. Raises: UserError."""
        smallest, own = self.resolutions[0], picture.facts.size
        for share in SMALLER_AREAS:
            side = int(smallest * share) // self.multiple * self.multiple
            size = self.best_size(own, max(side, self.multiple))
            if enlargement(own, size) <= self.max_upscale:
                return size
        raise UserError(
            f"{picture.short_name} has {own[0]} x {own[1]} pixels, too few for data.resolution"
            f"={smallest} even if it is made {self.max_upscale:g} times as large (data.max_upscale)"
            ": use a larger copy, remove it, or allow more"
        )


@dataclass(frozen=True)
class Bucket:
    """The pictures that are trained at one size, in pools; each as often as it counts."""

    size: Size
    pools: tuple[tuple[Picture, ...], ...]

    @property
    def num_pixels(self) -> int:
        return self.size[0] * self.size[1]


def make_buckets(
    pools: Sequence[Sequence[Picture]],
    rule: BucketRule,
    class_sets: Mapping[str, str] | None = None,
) -> list[Bucket]:
    """A bucket for each size of the first pool's pictures, in the order of the sizes.

    Of the other pools it has the pictures of its own size or, where there are none, all of them.
    class_sets: the concept that the class pictures of each concept belong to; those of several
    count in each bucket as much as their concepts do. Raises: UserError, as `BucketRule.sizes`.
    """
    sorted_pools = [pictures_by_size(pool, rule) for pool in pools]
    buckets = []
    for size in sorted(sorted_pools[0]):
        members = []
        for pool, by_size in zip(pools, sorted_pools, strict=True):
            found = by_size.get(size, [])
            if members and len(set((class_sets or {}).values())) > 1:
                members.append(balance_classes(members[0], (found, pool), class_sets))
            else:
                members.append(tuple(found or repeat_pictures(pool)))
        buckets.append(Bucket(size, tuple(members)))
    return buckets


def balance_classes(
    instance: Sequence[Picture],
    class_pictures: tuple[Sequence[Picture], Sequence[Picture]],
    class_sets: Mapping[str, str],
) -> tuple[Picture, ...]:
    """A bucket's class pictures, in which each class comes as often as its concepts do among the
    instance pictures.

    class_pictures: those of the bucket's size, and all; class_sets: as for `make_buckets`.
    """
    found, pool = class_pictures
    wanted = Counter(class_sets[p.concept] for p in instance if p.concept in class_sets)
    # a size that only concepts without class pictures have
    wanted = wanted or Counter(class_sets.values())
    groups = []
    for name in wanted:
        own = [picture for picture in found if picture.concept == name]
        groups.append(own or repeat_pictures([p for p in pool if p.concept == name]))
    factors = choose_factors([*wanted.values()], [len(group) for group in groups])
    return tuple(p for group, n in zip(groups, factors, strict=True) for p in group * n)


def concept_shares(pictures: Sequence[Picture], rule: BucketRule) -> dict[str, float]:
    """The share of each concept in the pictures that are drawn, by its name, in order."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        counts[picture.concept] += rule.weight(picture)
    return {name: count / counts.total() for name, count in counts.items()}


def class_shares(buckets: Sequence[Bucket]) -> dict[str, float]:
    """The share of each class in the class pictures that are seen, by the name of its concept."""
    shares: dict[str, float] = {}
    total = sum(len(bucket.pools[0]) for bucket in buckets)
    for bucket in buckets:
        weight = len(bucket.pools[0]) / total
        for name, count in Counter(picture.concept for picture in bucket.pools[1]).items():
            part = weight * count / len(bucket.pools[1])
            shares[name] = shares.get(name, 0) + part
    return shares


def pictures_by_size(pool: Sequence[Picture], rule: BucketRule) -> dict[Size, list[Picture]]:
    """Each picture as often as it counts, at each of its sizes."""
    result: dict[Size, list[Picture]] = {}
    for picture in repeat_pictures(pool):
        for size in rule.sizes(picture):
            result.setdefault(size, []).append(picture)
    return result


def repeat_pictures(pictures: Sequence[Picture]) -> list[Picture]:
    """Every picture as often as it counts; only the ratios of the counts matter."""
    divisor = gcd(*(picture.repeats for picture in pictures))
    repeated = []
    for picture in pictures:
        repeated += [picture] * (picture.repeats // divisor)
    return repeated


def count_largest_sizes(pictures: Sequence[Picture], rule: BucketRule) -> Counter[Size]:
    """How many pictures have each size, of several the largest."""
    return Counter(rule.sizes(picture)[-1] for picture in pictures)


def sizes_by_concept(pictures: Sequence[Picture], rule: BucketRule) -> dict[str, Counter[Size]]:
    """As `count_largest_sizes`, of each concept; a picture as often as it counts."""
    counts: dict[str, Counter[Size]] = {}
    for picture in repeat_pictures(pictures):
        own = counts.setdefault(picture.concept, Counter())
        own[rule.sizes(picture)[-1]] += 1
    return counts


def share_out(total: int, weights: Mapping[Size, int]) -> dict[Size, int]:
    """A total in proportion to weights, as whole numbers: by the largest remainders."""
    whole = sum(weights.values())
    shares = {size: total * weight // whole for size, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda size: (-(total * weights[size] % whole), size))
    for size in by_remainder[: total - sum(shares.values())]:
        shares[size] += 1
    return {size: share for size, share in shares.items() if share}


def choose_factors(shares: Sequence[float], counts: Sequence[int]) -> list[int]:
    """By which small whole number each count is multiplied so that the products are as the shares.

    The smallest that come within `SHARE_TOLERANCE`, or the nearest.
    """
    ratios = [share / count for share, count in zip(shares, counts, strict=True)]
    nearest, least = [1] * len(counts), float("inf")
    for scale in range(1, MAX_FACTOR + 1):
        factors = [max(1, round(scale * ratio / min(ratios))) for ratio in ratios]
        error = share_error(shares, counts, factors)
        if error < least:
            nearest, least = factors, error
        if least <= SHARE_TOLERANCE:
            break
    return nearest


def share_error(shares: Sequence[float], counts: Sequence[int], factors: Sequence[int]) -> float:
    """The largest difference between a wanted share and what the factors make of it, relative."""
    products = [count * factor for count, factor in zip(counts, factors, strict=True)]
    parts = [product / sum(products) for product in products]
    total = sum(shares)
    return max(abs(part * total / share - 1) for part, share in zip(parts, shares, strict=True))
