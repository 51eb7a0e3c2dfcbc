"""The gate that a LoRA of the small world must pass, and how what it learned is shown."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from .measure import Measurement
from .world import CLASS_PROMPT, INSTANCE_PROMPT, SIZE, TRAINING_SEED, subject_images

# Metric: the least and the most that pass. A LoRA trained with prior preservation must meet PRIOR;
# one trained without it must meet CONTRAST, which shows that it is the prior that preserves.
LEARN = {"loss_ratio": (0.0, 0.75), "cosine_gain": (0.60, 2.0), "attributes": (0.75, 1.0)}
PRIOR = {"leak": (0.0, 0.25), "class_star": (0.75, 1.0), "drift": (0.0, 0.60)}
OTHERS = {f"other_{name}": (0.8, 1.0) for name in ("shape", "colour", "background")}
CONTRAST = {"leak": (0.75, 1.0), "drift": (0.80, 2.0)}
# each has the lines of those before it
LEVELS = {"learnt": LEARN, "kept": LEARN | PRIOR, "whole": LEARN | PRIOR | OTHERS}

# of the sheet, in pixels
GAP, MARGIN = 4, 230


def gate(metrics: Mapping[str, float], prior: bool = True) -> dict[str, bool]:
    """Which lines of the gate pass."""
    passed = {}
    for name, (minimum, maximum) in (LEARN | (PRIOR if prior else CONTRAST)).items():
        passed[name] = minimum <= metrics[name] <= maximum
    return passed


def format_gate(
    base: Mapping[str, float], tuned: Mapping[str, float], passed: Mapping[str, bool]
) -> str:
    """Every metric before and after, with the gate's limits."""
    limits = LEARN | (PRIOR if "class_star" in passed else CONTRAST)
    lines = [f"{'':18}{'base':>8}{'LoRA':>8}   gate"]
    for name, value in tuned.items():
        verdict = ""
        if name in passed:
            minimum, maximum = limits[name]
            verdict = f"{minimum:.2f} .. {maximum:.2f}  {'passed' if passed[name] else 'FAILED'}"
        lines.append(f"{name:18}{base[name]:8.3f}{value:8.3f}   {verdict}".rstrip())
    return "\n".join(lines)


def before_after_grid(
    base: Measurement, tuned: Measurement, columns: int = 8, scale: int = 4
) -> Image.Image:
    """A labelled sheet: the training pictures, then each row without and with the LoRA.

    Pictures above each other start from the same noise.
    """
    rows = {"training pictures": subject_images(5, TRAINING_SEED)}
    titles = (INSTANCE_PROMPT, "... and a background", CLASS_PROMPT, "other classes")
    for row, title in zip(base.pictures, titles, strict=True):
        rows[f"{title}\nbase"] = base.pictures[row]
        rows[f"{title}\nLoRA"] = tuned.pictures[row]
    tile = SIZE * scale
    step = tile + GAP
    sheet = Image.new("RGB", (MARGIN + columns * step, len(rows) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for y, (title, pictures) in enumerate(rows.items()):
        draw.multiline_text((8, y * step + tile // 3), title, fill="black", font=font)
        for x, picture in enumerate(pictures[:columns]):
            enlarged = picture.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + x * step, y * step))
    return sheet
