"""A canvas that remembers where its texts stand, so that OCR's return is what was drawn.

Everything is painted at twice the size and scaled down, which smooths the edges; coordinates in and
out are those of the finished image, in px. Fonts are the DejaVu files that ship with matplotlib, so
an image depends on the versions of Pillow and matplotlib only.

Next: data_pipelines/gta_policy/families/documents.py
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in px
Line = tuple[Box, str]
SCALE = 2  # painted larger, then scaled down
JPEG_QUALITY = 92
FONTS = {
    "sans": "DejaVuSans.ttf",
    "bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif bold": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "italic": "DejaVuSerif-Italic.ttf",
}


@dataclasses.dataclass(frozen=True)
class Canvas:
    """An image being painted, and the lines of text on it."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    lines: list[Line]


def make_canvas(width: int, height: int, color: str = "white") -> Canvas:
    """An empty canvas of a finished size."""
    image = Image.new("RGB", (width * SCALE, height * SCALE), color)
    return Canvas(image, ImageDraw.Draw(image), [])


def write(
    canvas: Canvas,
    xy: tuple[float, float],
    text: str,
    size: float,
    *,
    font: str = "sans",
    color: str = "black",
    anchor: str = "la",
) -> Box:
    """Write one line and remember its box. `anchor` is Pillow's, such as "mm" or "ra"."""
    place, face = (xy[0] * SCALE, xy[1] * SCALE), _font(font, round(size * SCALE))
    canvas.draw.text(place, text, fill=color, font=face, anchor=anchor)
    x1, y1, x2, y2 = canvas.draw.textbbox(place, text, font=face, anchor=anchor)
    box = (
        math.floor(x1 / SCALE),
        math.floor(y1 / SCALE),
        math.ceil(x2 / SCALE),
        math.ceil(y2 / SCALE),
    )
    canvas.lines.append((box, text))
    return box


def rectangle(
    canvas: Canvas,
    box: Sequence[float],
    fill: str | None = None,
    *,
    outline: str | None = None,
    width: float = 1.0,
    radius: float = 0.0,
) -> None:
    """A rectangle with round corners."""
    scaled = [value * SCALE for value in box]
    style = {"fill": fill, "outline": outline, "width": round(width * SCALE)}
    canvas.draw.rounded_rectangle(scaled, radius * SCALE, **style)


def ellipse(
    canvas: Canvas,
    box: Sequence[float],
    fill: str | None = None,
    *,
    outline: str | None = None,
    width: float = 1.0,
) -> None:
    """An ellipse in a box."""
    scaled = [value * SCALE for value in box]
    canvas.draw.ellipse(scaled, fill=fill, outline=outline, width=round(width * SCALE))


def polygon(canvas: Canvas, points: Sequence[tuple[float, float]], fill: str) -> None:
    """A filled polygon."""
    scaled = [(x * SCALE, y * SCALE) for x, y in points]
    canvas.draw.polygon(scaled, fill=fill)


def line(
    canvas: Canvas,
    points: Sequence[tuple[float, float]],
    color: str = "black",
    *,
    width: float = 1.0,
) -> None:
    """A line through points."""
    scaled = [(x * SCALE, y * SCALE) for x, y in points]
    canvas.draw.line(scaled, fill=color, width=round(width * SCALE), joint="curve")


def gradient(canvas: Canvas, top: str, bottom: str, y1: float, y2: float) -> None:
    """A vertical gradient over the whole width, between two heights."""
    rows = round((y2 - y1) * SCALE)
    ends = [np.array(_rgb(color), np.float64) for color in (top, bottom)]
    share = np.linspace(0.0, 1.0, rows)[:, None, None]
    pixels = ends[0] * (1 - share) + ends[1] * share
    pixels = np.broadcast_to(pixels, (rows, canvas.image.width, 3)).round().astype(np.uint8)
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(pixels), "RGB"), (0, round(y1 * SCALE)))


def finish(canvas: Canvas) -> bytes:
    """The finished image as JPEG."""
    size = (canvas.image.width // SCALE, canvas.image.height // SCALE)
    return encode_jpeg(canvas.image.resize(size, Image.Resampling.LANCZOS))


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG without chroma subsampling, so that thin coloured letters stay sharp."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def read_lines(lines: Sequence[Line]) -> str:
    """What OCR returns: `(x1, y1, x2, y2) TEXT` per text, row by row, each from left to right."""
    rows: list[list[Line]] = []
    for found in sorted(lines, key=lambda found: found[0][1] + found[0][3]):
        middle = (found[0][1] + found[0][3]) / 2
        if rows and rows[-1][0][0][1] <= middle <= rows[-1][0][0][3]:
            rows[-1].append(found)
        else:
            rows.append([found])
    ordered = [found for row in rows for found in sorted(row, key=lambda found: found[0][0])]
    return "\n".join(f"{box} {text}" for box, text in ordered)


def render_figure(
    width: int, height: int, paint: Callable[[Figure], None], *, dpi: int = 100
) -> tuple[bytes, list[Line]]:
    """A matplotlib figure as JPEG with every visible text and its box."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg"}):
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, layout="tight")
        canvas = FigureCanvasAgg(figure)
        paint(figure)
        canvas.draw()
        lines: list[Line] = []
        seen: set[Line] = set()
        for artist in figure.findobj(Text):
            assert isinstance(artist, Text)
            text = artist.get_text().strip()
            if not text or not artist.get_visible():
                continue
            extent = artist.get_window_extent(canvas.get_renderer())
            box = (
                math.floor(extent.x0),
                math.floor(height - extent.y1),
                math.ceil(extent.x1),
                math.ceil(height - extent.y0),
            )
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
            entry = (box, text.replace("\u2212", "-"))
            if inside and entry not in seen:  # tick labels beyond the axis are not drawn
                seen.add(entry)
                lines.append(entry)
        pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    return encode_jpeg(Image.fromarray(np.ascontiguousarray(pixels), "RGB")), lines


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[name]
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _rgb(color: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), color).getpixel((0, 0))  # type: ignore[return-value]
