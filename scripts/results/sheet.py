"""docs/from_scratch.png: what the runs of the other scripts here made.

python scripts/results/sheet.py [--out runs/results]
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainers.cli import make_parser
from trainers.run_folder import FINAL, GRID_NAME, SAMPLES

HEIGHT = 320


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the runs")
    folder = parser.parse_args().out
    digits, colors = grid(folder / "gan_seed0"), grid(folder / "colorize_regression")
    panels = [
        (
            "codes of an autoencoder",
            Image.open(folder / "reconstruct_seed0/samples/final/codes.png").convert("RGB"),
        ),
        ("digits by a GAN", digits.crop((0, 24, digits.width, digits.height))),
        ("membranes: shown, found, true", beside(first(folder / "segment_fold0", 0, 1, 2))),
        ("colours: shown, made, true", colors.crop((0, 0, colors.width * 6 // 10, colors.height))),
        (
            "a micrograph from membranes, by pix2pix",
            beside(first(folder / "pix2pix_adversary", 0, 1)),
        ),
    ]
    rows = [panels[:3], panels[3:]]
    sheets = []
    for row in rows:
        scaled = [
            (t, p.resize((round(p.width * HEIGHT / p.height), HEIGHT), Image.Resampling.LANCZOS))
            for t, p in row
        ]
        sheet = Image.new("RGB", (sum(p.width + 12 for _, p in scaled), HEIGHT + 28), "white")
        draw, x = ImageDraw.Draw(sheet), 0
        for title, panel in scaled:
            draw.text((x + 4, 4), title, "black", ImageFont.load_default(16))
            sheet.paste(panel, (x, 28))
            x += panel.width + 12
        sheets.append(sheet)
    combined = Image.new(
        "RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white"
    )
    y = 0
    for sheet in sheets:
        combined.paste(sheet, (0, y))
        y += sheet.height
    combined.save("docs/from_scratch.png", optimize=True)


def grid(run: Path) -> Image.Image:
    return Image.open(run / SAMPLES / FINAL / GRID_NAME).convert("RGB")


def first(run: Path, *rows: int) -> list[Image.Image]:
    """The first picture of some rows of a grid of three rows and three pictures."""
    sheet = grid(run)
    third, side = sheet.height // 3, (sheet.width - 6 * 4) // 3
    return [sheet.crop((6, 30 + row * third, 6 + side, 30 + row * third + side)) for row in rows]


def beside(parts: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(p.width + 6 for p in parts) - 6, parts[0].height), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i * (part.width + 6), 0))
    return sheet


if __name__ == "__main__":
    main()
