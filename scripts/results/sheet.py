"""Write docs/from_scratch.png: what the runs of the other scripts here made.

python scripts/results/sheet.py [--out runs/results]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainers.cli import make_parser, run_main
from trainers.run_folder import FINAL, GRID_NAME, SAMPLES

HEIGHT = 320  # of a panel, in pixels
TITLE_HEIGHT = 28
# of the grids that runs write, in pixels
GRID_MARGIN, GRID_GAP, GRID_TITLE = 6, 4, 30


def main() -> None:
    parser = make_parser(__doc__)
    help = "The folder of the runs."
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help=help)
    folder = parser.parse_args().out
    codes = Image.open(folder / "reconstruct_seed0" / SAMPLES / FINAL / "codes.png").convert("RGB")
    digits, colors = read_grid(folder / "gan_seed0"), read_grid(folder / "colorize_regression")
    membranes = first_pictures(folder / "segment_fold0", 0, 1, 2)
    micrographs = first_pictures(folder / "pix2pix_adversary", 0, 1)
    upper = {
        "codes of an autoencoder": codes,
        "digits by a GAN": digits.crop((0, 24, digits.width, digits.height)),
        "membranes: shown, found, true": side_by_side(membranes, GRID_MARGIN),
    }
    lower = {
        "colours: shown, made, true": colors.crop((0, 0, colors.width * 6 // 10, colors.height)),
        "a micrograph from membranes, by pix2pix": side_by_side(micrographs, GRID_MARGIN),
    }
    rows = [side_by_side([titled(*item) for item in row.items()], 12) for row in (upper, lower)]
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
    )
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    sheet.save("docs/from_scratch.png", optimize=True)


def read_grid(run: Path) -> Image.Image:
    return Image.open(run / SAMPLES / FINAL / GRID_NAME).convert("RGB")


def first_pictures(run: Path, *rows: int) -> list[Image.Image]:
    """The first picture of some rows of a grid of three rows and three pictures."""
    grid = read_grid(run)
    height, side = grid.height // 3, (grid.width - 6 * GRID_GAP) // 3
    pictures = []
    for row in rows:
        left, top = GRID_MARGIN, GRID_TITLE + row * height
        pictures.append(grid.crop((left, top, left + side, top + side)))
    return pictures


def titled(title: str, picture: Image.Image) -> Image.Image:
    """The picture, scaled to the common height, below its title."""
    width = round(picture.width * HEIGHT / picture.height)
    panel = Image.new("RGB", (width, HEIGHT + TITLE_HEIGHT), "white")
    ImageDraw.Draw(panel).text((4, 4), title, "black", ImageFont.load_default(16))
    panel.paste(picture.resize((width, HEIGHT), Image.Resampling.LANCZOS), (0, TITLE_HEIGHT))
    return panel


def side_by_side(pictures: list[Image.Image], gap: int) -> Image.Image:
    """Pictures of one height from left to right."""
    width = sum(picture.width + gap for picture in pictures) - gap
    row, x = Image.new("RGB", (width, pictures[0].height), "white"), 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


if __name__ == "__main__":
    sys.exit(run_main(main))
