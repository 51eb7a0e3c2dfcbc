"""The jinja templates of the report, in which every text is escaped unless it is markup already."""

from __future__ import annotations

import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainers.progress import format_seconds

LABELS = {
    "grad_norm": "gradient norm",
    "peak_memory_gib": "peak memory, GiB",
    "best": "best checkpoint",
    "held_out_psnr": "held-out PSNR, dB",
    "held_out_ssim": "held-out SSIM",
    "held_out_auroc": "held-out AUROC",
    "held_out_kid": "held-out KID",
    "held_out_dice": "held-out Dice",
    "held_out_iou": "held-out IoU",
    "net": "feature network",
    "prompt_net": "prompt network",
    "photos": "reference photos",
}


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: object, digits: int = 4) -> str:
    """A number with so many significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    is_integer = isinstance(value, int) or (value.is_integer() and abs(value) < 1e7)
    text = f"{value:.0f}" if is_integer else f"{value:.{digits}g}"
    # 1e-05 and 1e+05 become 1e-5 and 1e5
    return re.sub("e([-+])0*", lambda match: "e" + match[1].strip("+"), text)


def display_name(name: str) -> str:
    """The name of a metric as people read it."""
    return LABELS.get(name, name.replace("_", " "))


def format_time(seconds: float) -> str:
    """The date and time of day here, of seconds since 1970."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters["display_name"] = display_name
environment.filters["format_value"] = format_value
environment.filters["format_time"] = format_time
environment.filters["format_seconds"] = format_seconds

# Its macros are functions from values to safe HTML: `parts.table(...)`.
parts: Any = environment.get_template("report_parts.html.jinja").module
