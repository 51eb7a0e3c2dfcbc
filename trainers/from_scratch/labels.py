"""The classes of a data set: whatever its label column holds, as numbers from 0 without a gap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.config import ImagesConfig
from trainers.data.pictures import open_dataset
from trainers.errors import UserError

if TYPE_CHECKING:
    import datasets

Label = int | str
UNLABELED = -1  # in `datasets`: of a row whose class is not known
MAX_NAMED = 5  # classes that a message names
# more pictures than that, each of a class of its own, are a reason to ask
MAX_SINGLE_CLASSES = 8


@dataclass(frozen=True)
class Classes:
    """Class i of the networks is `values[i]` in the label column, and `names[i]` for people.

    The first `num_trained` have training pictures; others, which only anomalies may have, follow.
    """

    values: tuple[Label, ...]
    names: tuple[str, ...]
    num_trained: int

    def index(self, label: Label) -> int:
        """Of a value of the column or of a name; UNLABELED where there is no such class."""
        if label in self.values:
            return self.values.index(label)
        return self.names.index(label) if label in self.names else UNLABELED

    def indices(self, rows: datasets.Dataset, column: str, source: str) -> list[int]:
        """Of all rows. Raises: UserError, as `read_labels`."""
        labels, _ = read_labels(rows, column, source)
        index_by_label = {label: index for index, label in enumerate(self.values)}
        return [index_by_label[label] for label in labels]


def read_labels(
    rows: datasets.Dataset, column: str, source: str
) -> tuple[list[Label], Callable[[Label], str]]:
    """Each row's class as the column has it, and how classes are called.

    bool and whole floats become int. Raises: UserError for rows without a class and for values
    that are none.
    """
    feature = rows.features[column]
    label_names = getattr(feature, "names", None)  # of a `datasets.ClassLabel`
    values = [whole_number(value) for value in rows[column]]
    distinct = set(filter(is_scalar, values))
    # two classes may be called -1 and 1, but not where the classes are known by their names
    minus_one_is_missing = label_names is not None or distinct != {UNLABELED, 1}
    missing = {None, ""} | ({UNLABELED} if minus_one_is_missing else set())
    for row, value in enumerate(values):
        if value is not None and not is_scalar(value):
            raise UserError(
                f"{source}: row {row} of the column {column!r} is {value!r}, which is no class. "
                "A class is one whole number, text or yes-or-no. Choose another column, or set "
                "data.label_column to null to train without classes"
            )
    if count := sum(value in missing for value in values):
        example = next(repr(value) for value in values if value in missing)
        raise UserError(
            f"{source}: {count} of {len(values)} rows have no class, but {example}, in the column "
            f"{column!r}. Remove those rows, or set data.label_column to null to train without "
            "classes"
        )
    return values, lambda value: label_names[value] if label_names else str(value)


def whole_number(value: object) -> object:
    """A bool or a whole float as an int, NaN as None; text without the spaces around it."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value.strip() if isinstance(value, str) else value


def is_scalar(value: object) -> bool:
    return isinstance(value, Label)


def find_classes(config: ImagesConfig) -> Classes | None:
    """The classes of the training split, in order, and behind them those that the test split alone
    has; None where there is no label column.

    Raises: UserError where the test split has such classes, unless one class alone is learned.
    """
    if config.dataset_name is None or config.label_column is None:
        return None
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    found: list[dict[Label, str]] = []
    for split in filter(None, (config.train_split, config.test_split)):
        rows = open_dataset(config.dataset_name, split, columns)
        source = f"data: {config.dataset_name}, split {split!r}"
        labels, name_of = read_labels(rows, config.label_column, source)
        found.append({label: name_of(label) for label in sort_labels(set(labels))})
        if split == config.train_split and len(found[0]) == len(labels) > MAX_SINGLE_CLASSES:
            warnings.warn(
                f"data.label_column: each of the {len(labels)} training pictures has a class of "
                f"its own. Is {config.label_column!r} rather the number or the name of a picture?",
                stacklevel=2,
            )
    trained, unseen = found[0], {}
    if len(found) > 1:
        unseen = {label: name for label, name in found[1].items() if label not in trained}
    if unseen and config.only_label is None:
        raise UserError(
            f"data.test_split: {config.test_split!r} has {len(unseen)} classes that no training "
            f"picture has: {list_names(list(unseen.values()))}. Remove those pictures, or set "
            "data.label_column to null to train without classes"
        )
    values, names = [*trained, *unseen], [*trained.values(), *unseen.values()]
    return Classes(tuple(values), tuple(names), len(trained))


def sort_labels(labels: set[Label]) -> list[Label]:
    """Numbers by their size, texts that are numbers too."""
    if all(isinstance(label, str) and label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
