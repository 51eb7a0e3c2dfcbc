"""Pictures decoded ahead of their encoding, and encoded several at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from trainers.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from trainers.data.crops import Crop
    from trainers.data.pictures import Picture

THREADS = 4  # that decode, each a picture at a time
MAX_VIEWS = 4  # that are cut out of a picture in one go: their pixels wait in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in the order of the items, of which the next few are computed in threads.

    An error is raised where its result would come.
    """
    pool, pending = ThreadPoolExecutor(THREADS), deque[Future[Result]]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode_views(views: Iterable[tuple[Picture, Crop]]) -> Iterator[Tensor]:
    """The pixels (3, H, W) of each view, in their order.

    A picture is decoded once for some of its views that follow one another.
    """
    for pixels in map_ahead(cut_views, group_views(views)):
        yield from pixels


def group_views(views: Iterable[tuple[Picture, Crop]]) -> Iterator[tuple[Picture, list[Crop]]]:
    for picture, same in groupby(views, key=lambda view: view[0]):
        while crops := [crop for _, crop in islice(same, MAX_VIEWS)]:
            yield picture, crops


def cut_views(group: tuple[Picture, list[Crop]]) -> list[Tensor]:
    picture, crops = group
    image = picture.decode()
    return [crop(image) for crop in crops]


class BatchEncoder:
    """Encodes items in batches of `size`, which is halved where they do not fit into memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self,
        encode: Callable[[list[Item]], Sequence[Result]],
        items: Iterable[Item],
        kind: Callable[[Item], Hashable],
    ) -> Iterator[Result]:
        """The results in the order of the items; those of a batch follow one another and are of
        one kind."""
        batch: list[Item] = []
        for item in items:
            if batch and (len(batch) >= self.size or kind(item) != kind(batch[0])):
                yield from self.encode(encode, batch)
                batch = []
            batch.append(item)
        yield from self.encode(encode, batch)

    def encode(
        self, encode: Callable[[list[Item]], Sequence[Result]], items: list[Item]
    ) -> Iterator[Result]:
        while items:
            part, results = items[: self.size], None
            try:
                results = encode(part)
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self.size = len(part) // 2
            if results is None:
                # only now has the error let go of what did not fit
                clear_device_cache(garbage_collection=True)
                warnings.warn(
                    f"data.encode_batch_size: out of memory with {len(part)} at a time, so it is "
                    f"{self.size} from here on",
                    stacklevel=2,
                )
                continue
            yield from results
            items = items[len(part) :]
