"""What `--inside` times: a family, the pictures of a batch, and options of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmark.sizes import SIZES, Size

CHECKPOINTED = "train.gradient_checkpointing=true"
SELECTIVE = "train.gradient_checkpointing=selective"
MODULATION_CACHE = "model.modulation_cache=true"
COMPILED = "train.compile=true"


@dataclass(frozen=True)
class Cell:
    """has_scripts: whether the scripts can do what our options do, and are timed too."""

    family: str
    rows: int = 1  # pictures in a batch
    options: tuple[str, ...] = ()  # of ours
    has_scripts: bool = True
    pixels: int | None = None  # instead of those of the true size

    def size(self, name: str) -> Size:
        size = SIZES[self.family][name]
        if self.pixels and name == "true":
            return replace(size, resolution=self.pixels)
        return size


# those that wait for the compiler are the last
CELLS = {
    "sd15-512-bs1": Cell("sd15"),
    "sd15-512-bs4": Cell("sd15", rows=4),
    "sd3-1024-bs1": Cell("sd3"),
    "flux-512-bs1": Cell("flux", pixels=512),
    "flux-1024-bs1-checkpointing": Cell("flux", options=(CHECKPOINTED,)),
    "flux-1024-bs1-selective": Cell("flux", options=(SELECTIVE,), has_scripts=False),
    "flux-1024-bs1": Cell("flux"),
    "sd3-1024-bs1-modulation_cache": Cell("sd3", options=(MODULATION_CACHE,), has_scripts=False),
    "flux-1024-bs1-checkpointing-modulation_cache": Cell(
        "flux", options=(CHECKPOINTED, MODULATION_CACHE), has_scripts=False
    ),
    "sd3-1024-bs4": Cell("sd3", rows=4),
    "sd3-1024-bs1-compile": Cell("sd3", options=(COMPILED,), has_scripts=False),
    "flux-512-bs1-compile": Cell("flux", options=(COMPILED,), has_scripts=False, pixels=512),
}
