"""The limits of what a config may hold: every number, text, list and path has some.

They keep out what can only be a slip (a learning rate of 1e300) and leave in what anybody has had
a use for. `tests/config/test_bounds.py` sees to it that no key is without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MAX_PATH_LENGTH = 4096  # bytes, as on Linux
MAX_SEED = 2**32 - 1  # what both numpy and torch take


def parse_path(value: Any) -> Any:
    """A path with ~ written out; what is no text is left for pydantic to refuse.

    Raises: ValueError for what no file system takes, and for the empty text, which Python reads as
    the working directory.
    """
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if not text.strip():
        raise ValueError("must not be empty: write a path, or . for the working directory")
    if "\0" in text or len(text.encode("utf-8", "surrogatepass")) > MAX_PATH_LENGTH:
        raise ValueError(f"is not a path: it has a NUL, or more than {MAX_PATH_LENGTH} bytes")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~ and a user that is not known here") from None


Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=8, le=2048, multiple_of=8)]
CodeSize = Annotated[int, Field(ge=1, le=16384)]  # numbers in a code or latent vector

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
# Prodigy's 1.0 is the largest that is usual
LearningRate = Annotated[float, Field(ge=0, le=10)]
# the weight of one part of a loss, relative to another
LossWeight = Annotated[float, Field(ge=0, le=10_000)]
# of noise on pictures in 0..1
NoiseLevel = Annotated[float, Field(ge=0, le=10)]
# beyond it pictures are burnt; 1 to 10 is usual
Guidance = Annotated[float, Field(ge=0, le=100)]


def expand_home(name: str) -> str:
    """A name on the Hub as it is, and a path with ~ written out."""
    return str(parse_path(name)) if name.startswith("~") else name


Name = Annotated[str, Field(max_length=1000)]  # of a model, column, branch or layer
Prompt = Annotated[str, Field(max_length=10_000)]
# a name on the Hub, or a path
NameOrPath = Annotated[str, Field(max_length=1000), AfterValidator(expand_home)]
PathField = Annotated[Path, BeforeValidator(parse_path)]
