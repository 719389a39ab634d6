"""Pictures of many images: a grid, with headings if wanted."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (28, 28, 30), (120, 120, 126)
SMALLEST, LARGEST = 96, 256  # pixels of a cell: small images are enlarged, large ones reduced


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    heads: Sequence[str] = (),
    rows: Sequence[str] = (),
    cell: int | None = None,
    gap: int = 2,
) -> Image.Image:
    """Images side by side, row after row, on white.

    Args:
        images: all of one size; the last row may be short.
        columns: images in a row.
        heads: a heading above each column; empty for none.
        rows: a label left of each row, its further lines in grey; empty for none.
        cell: width of an image in the grid; by default its own, within 96 and 256 pixels, in whole
            multiples where it is enlarged.
        gap: pixels between images.

    Raises:
        ValueError: if there is no image, or the sizes or the number of headings do not fit.
    """
    count = -(-len(images) // columns)
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(f"expected images of one size, got {len(images)} of different sizes")
    if (heads and len(heads) != columns) or (rows and len(rows) != count):
        raise ValueError(
            f"expected {columns} heads and {count} rows, got {len(heads)} and {len(rows)}"
        )
    width, height = _cell(images[0].size, cell)
    size = max(11, width // 6)
    bold, small = _font(size), _font(max(10, round(size * 0.8)))
    left = gap + (_widest(rows, bold) + size if rows else 0)
    top = gap + (2 * size if heads else 0)
    area = (left + columns * (width + gap), top + count * (height + gap))
    sheet = Image.new("RGB", area, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        middle = left + column * (width + gap) + width / 2
        draw.text((middle, top - size * 0.6), text, fill=INK, font=small, anchor="ms")
    for row, text in enumerate(rows):
        middle = top + row * (height + gap) + height / 2
        _row_label(draw, text, left - size / 2, middle, bold, small)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        place = (left + column * (width + gap), top + row * (height + gap))
        sheet.paste(_resized(image.convert("RGB"), width, height), place)
    return sheet


def _cell(size: tuple[int, int], cell: int | None) -> tuple[int, int]:
    width, height = size
    if cell is None:
        cell = min(width, LARGEST) if width >= SMALLEST else width * -(-SMALLEST // width)
    return cell, round(height * cell / width)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _row_label(
    draw: ImageDraw.ImageDraw, text: str, right: float, middle: float, bold: Font, small: Font
) -> None:
    first, *more = text.split("\n")
    line = bold.size * 1.3
    y = middle - line * len(more) / 2
    draw.text((right, y), first, fill=INK, font=bold, anchor="rm")
    for index, text in enumerate(more, 1):
        draw.text((right, y + index * line), text, fill=FAINT, font=small, anchor="rm")


def _widest(texts: Sequence[str], font: Font) -> int:
    lines = [line for text in texts for line in text.split("\n")]
    return round(max(font.getlength(line) for line in lines))


Font = ImageFont.FreeTypeFont


def _font(size: int) -> Font:
    """PIL's own font: nothing has to be installed."""
    return ImageFont.load_default(size)  # type: ignore[return-value]
