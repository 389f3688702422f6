"""Draw a photo of returned goods on the desk: SVG, rendered by resvg.

In: an Item (what it is and what happened to it) and a seed (where it stands, the light, the desk).
Out: RGB pixels. Every fact of the Item is visible: the goods and their colour, the damage, the seal
(green and whole, or red and torn) and the box (closed, open, or none).

Next: examples/returns_desk/judge.py
"""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import resvg_py
from PIL import Image

GOODS = ("mug", "kettle", "lamp", "headphones", "sneaker", "backpack")
DAMAGES = ("none", "scratch", "crack", "stain")
SEALS = ("whole", "torn")
BOXES = ("closed", "open", "none")
COLOURS = {
    "red": (196, 52, 48),
    "blue": (46, 96, 178),
    "green": (54, 134, 84),
    "yellow": (224, 176, 48),
    "grey": (128, 134, 142),
    "purple": (126, 74, 156),
}
WIDTH, HEIGHT = 336, 224  # px; 3:2, twice what the nano model sees

# Where damage and seal go, in the coordinates of the goods: (x, y, half width, half height)
DAMAGE_AREAS = {
    "mug": (-14, -46, 17, 25),
    "kettle": (-20, -38, 18, 22),
    "lamp": (-30, -85, 17, 9),
    "headphones": (-43, -34, 11, 20),
    "sneaker": (10, -31, 24, 10),
    "backpack": (-16, -82, 20, 14),
}
SEAL_PLACES = {
    "mug": (20, -32),
    "kettle": (20, -26),
    "lamp": (18, -7),
    "headphones": (43, -32),
    "sneaker": (-36, -33),
    "backpack": (24, -84),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """What lies on the desk."""

    goods: str
    colour: str
    damage: str
    seal: str
    box: str


def draw_photo(item: Item, seed: int) -> np.ndarray:
    """uint8 [224, 336, 3]."""
    rng = np.random.default_rng([seed, 1])
    ground = 176 + rng.uniform(-5, 8)
    side = rng.choice([-1, 1])  # the box stands left or right of the goods
    centre = WIDTH / 2 - side * (42 if item.box != "none" else 0) + rng.uniform(-12, 12)
    scale = rng.uniform(1.12, 1.3)
    tilt = rng.uniform(-4, 4)
    flip = -1 if rng.random() < 0.5 else 1
    box_x = WIDTH / 2 + side * 98 + rng.uniform(-8, 8)
    parts = [_room(rng)]
    if item.box != "none":
        parts.append(_place(box_x, ground - 12, rng.uniform(0.95, 1.1), 0, 1, _box(item.box, rng)))
    parts.append(_place(centre, ground, scale, tilt, flip, _goods(item, rng, flip)))
    parts.append(_light(rng))
    return render(_document("".join(parts), WIDTH, HEIGHT))


def draw_detail(item: Item, seed: int, width: int = 112, height: int = 84) -> np.ndarray:
    """A close view for the policy: the damaged place, or the seal where there is no damage."""
    rng = np.random.default_rng([seed, 2])
    if item.damage != "none":
        x, y, *_ = DAMAGE_AREAS[item.goods]
    else:
        x, y = SEAL_PLACES[item.goods]
    zoom = 1.5
    moved = f'<g transform="translate({width / 2 - zoom * x:.1f} {height / 2 - zoom * y:.1f})">'
    body = _place(0, 0, zoom, 0, 1, _goods(item, rng, 1))
    return render(_document(f"{_room(rng)}{moved}{body}</g>", width, height))


def render(svg: str) -> np.ndarray:
    """uint8 [Y, X, 3] of an SVG document."""
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _document(body: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}">'
        '<defs><filter id="soft" x="-50%" y="-50%" width="200%" height="200%">'
        '<feGaussianBlur stdDeviation="5"/></filter>'
        '<filter id="faint" x="-50%" y="-50%" width="200%" height="200%">'
        '<feGaussianBlur stdDeviation="1.2"/></filter></defs>'
        f"{body}</svg>"
    )


def _place(x: float, y: float, scale: float, tilt: float, flip: int, body: str) -> str:
    return (
        f'<g transform="translate({x:.1f} {y:.1f}) rotate({tilt:.1f})'
        f' scale({flip * scale:.3f} {scale:.3f})">{body}</g>'
    )


def _room(rng: np.random.Generator) -> str:
    """A wall, a table top with a few lines of grain, and where they meet."""
    wall = _shade((206, 208, 204), rng.uniform(0.85, 1.08))
    wood = np.array([(170, 128, 88), (188, 158, 122), (134, 104, 80), (176, 178, 180)])
    top = _shade(wood[rng.integers(len(wood))], rng.uniform(0.92, 1.08))
    horizon = 118 + rng.uniform(-10, 10)
    grain = "".join(
        f'<path d="M0 {y:.0f} C 90 {y + rng.uniform(-4, 4):.0f} 220 {y + rng.uniform(-4, 4):.0f}'
        f' 336 {y + rng.uniform(-3, 3):.0f}" stroke="{_css(top, 0.88)}" stroke-width="1"'
        ' fill="none" opacity="0.6"/>'
        for y in np.linspace(horizon + 8, HEIGHT, 9) + rng.uniform(-2, 2, 9)
    )
    return (
        _gradient("wall", wall, 1.06, 0.9, vertical=True)
        + _gradient("top", top, 0.86, 1.1, vertical=True)
        + f'<rect width="{WIDTH}" height="{HEIGHT}" fill="url(#wall)"/>'
        + f'<rect y="{horizon:.0f}" width="{WIDTH}" height="{HEIGHT}" fill="url(#top)"/>'
        + grain
        + f'<rect y="{horizon - 1:.0f}" width="{WIDTH}" height="3" fill="{_css(top, 0.6)}"'
        ' opacity="0.5"/>'
    )


def _light(rng: np.random.Generator) -> str:
    """Light falls from a corner and fades: a last, faint layer over everything."""
    x = rng.choice([0.15, 0.85])
    return (
        f'<radialGradient id="lamp" cx="{x}" cy="0.1" r="1.1">'
        '<stop offset="0" stop-color="#fff8e8" stop-opacity="0.22"/>'
        '<stop offset="0.55" stop-color="#ffffff" stop-opacity="0"/>'
        '<stop offset="1" stop-color="#101828" stop-opacity="0.22"/></radialGradient>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="url(#lamp)"/>'
    )


def _goods(item: Item, rng: np.random.Generator, flip: int) -> str:
    colour = COLOURS[item.colour]
    shadow = (
        '<ellipse cx="4" cy="0" rx="62" ry="8" fill="#000" opacity="0.42" filter="url(#soft)"/>'
    )
    body = _SHAPES[item.goods](colour)
    x, y = SEAL_PLACES[item.goods]
    seal = f'<g transform="translate({x} {y}) scale({flip} 1)">{_seal(item.seal)}</g>'
    return shadow + body + _damage(item, rng) + seal


def _mug(colour) -> str:
    return (
        _gradient("body", colour, 1.25, 0.62)
        + f'<path d="M36 -66 C 66 -68 66 -22 35 -24" fill="none" stroke="{_css(colour, 0.72)}"'
        ' stroke-width="10" stroke-linecap="round"/>'
        + f'<path d="M36 -67 C 62 -68 62 -24 35 -25" fill="none" stroke="{_css(colour, 1.15)}"'
        ' stroke-width="3" opacity="0.7"/>'
        '<path d="M-40 -82 L-37 -8 C -36 4 36 4 37 -8 L40 -82 Z" fill="url(#body)"/>'
        f'<ellipse cx="0" cy="-82" rx="40" ry="10" fill="{_css(colour, 1.18)}"/>'
        f'<ellipse cx="0" cy="-81" rx="35" ry="7.6" fill="{_css(colour, 0.42)}"/>'
        '<path d="M-31 -70 L-29 -16" stroke="#fff" stroke-width="5" opacity="0.28"'
        ' stroke-linecap="round"/>'
    )


def _kettle(colour) -> str:
    return (
        _gradient("body", colour, 1.3, 0.58)
        + '<path d="M-30 -82 C -30 -124 34 -124 34 -82" fill="none" stroke="#2c2f33"'
        ' stroke-width="9" stroke-linecap="round"/>'
        + f'<path d="M40 -58 L68 -80 L76 -74 L46 -30 Z" fill="{_css(colour, 0.7)}"/>'
        f'<path d="M67 -81 L78 -75" stroke="{_css(colour, 0.4)}" stroke-width="4"/>'
        '<path d="M-34 -82 C -54 -60 -54 -18 -46 -4 C -44 2 44 2 46 -4 C 54 -18 54 -60 34 -82 Z"'
        ' fill="url(#body)"/>'
        f'<path d="M-34 -81 C -24 -94 24 -94 34 -81 Z" fill="{_css(colour, 0.85)}"/>'
        '<circle cx="0" cy="-95" r="6" fill="#24262a"/>'
        '<path d="M-46 -6 L46 -6 L44 1 L-44 1 Z" fill="#2c2f33"/>'
        '<path d="M-38 -66 C -44 -50 -44 -30 -41 -16" stroke="#fff" stroke-width="5" fill="none"'
        ' opacity="0.3" stroke-linecap="round"/>'
    )


def _lamp(colour) -> str:
    return (
        _gradient("body", colour, 1.3, 0.65)
        + '<path d="M-64 -60 L-78 -2 L10 -2 L-14 -62 Z" fill="#ffe9a8" opacity="0.38"/>'
        f'<ellipse cx="10" cy="-4" rx="38" ry="9" fill="{_css(colour, 0.6)}"/>'
        '<ellipse cx="10" cy="-8" rx="38" ry="9" fill="url(#body)"/>'
        '<path d="M14 -10 L38 -62 L-16 -108" fill="none" stroke="#3a3d42" stroke-width="6"'
        ' stroke-linejoin="round" stroke-linecap="round"/>'
        '<circle cx="38" cy="-62" r="6" fill="#24262a"/>'
        '<path d="M-26 -116 C -14 -120 -2 -108 -6 -98 L-8 -62 L-68 -62 C -66 -84 -48 -110 -26 -116'
        ' Z" fill="url(#body)"/>'
        '<ellipse cx="-38" cy="-62" rx="30" ry="6.5" fill="#fff3c4"/>'
        f'<ellipse cx="-38" cy="-62" rx="30" ry="6.5" fill="none" stroke="{_css(colour, 0.5)}"'
        ' stroke-width="2"/>'
    )


def _headphones(colour) -> str:
    def cup(x: int) -> str:
        return (
            f'<ellipse cx="{x}" cy="-32" rx="21" ry="30" fill="#2a2c30"/>'
            f'<ellipse cx="{x}" cy="-34" rx="17" ry="26" fill="url(#body)"/>'
            f'<ellipse cx="{x - 5}" cy="-46" rx="6" ry="8" fill="#fff" opacity="0.22"/>'
        )

    return (
        _gradient("body", colour, 1.25, 0.6)
        + '<path d="M-44 -50 C -48 -136 48 -136 44 -50" fill="none" stroke="#2a2c30"'
        ' stroke-width="13" stroke-linecap="round"/>'
        + f'<path d="M-40 -72 C -34 -122 34 -122 40 -72" fill="none" stroke="{_css(colour, 1.0)}"'
        ' stroke-width="6" stroke-linecap="round"/>' + cup(-43) + cup(43)
    )


def _sneaker(colour) -> str:
    laces = "".join(
        f'<path d="M{x} {y} l-9 11" stroke="#f4f4f0" stroke-width="3.4" stroke-linecap="round"/>'
        for x, y in ((-10, -64), (3, -56), (16, -49), (29, -42))
    )
    return (
        _gradient("body", colour, 1.2, 0.7, vertical=True)
        + '<path d="M-66 -16 C -68 -44 -64 -70 -56 -76 C -50 -68 -28 -66 -18 -72 C -10 -60 20 -40'
        ' 48 -36 C 66 -32 72 -22 72 -12 Z" fill="url(#body)"/>'
        f'<path d="M44 -36 C 64 -33 72 -24 72 -12 L38 -12 C 36 -22 38 -30 44 -36 Z"'
        f' fill="{_css(colour, 1.35)}"/>'
        f'<path d="M-64 -48 C -54 -44 -48 -40 -48 -14 L-66 -14 Z" fill="{_css(colour, 0.66)}"/>'
        f'<path d="M-56 -76 C -50 -68 -28 -66 -18 -72 L-16 -64 C -28 -58 -50 -60 -58 -68 Z"'
        f' fill="{_css(colour, 0.45)}"/>'
        + laces
        + '<path d="M-70 -16 L74 -16 C 78 -8 74 1 68 1 L-64 1 C -72 1 -74 -10 -70 -16 Z"'
        ' fill="#f2efe8"/>'
        '<path d="M-70 -7 L76 -7" stroke="#c4beb2" stroke-width="2"/>'
    )


def _backpack(colour) -> str:
    return (
        _gradient("body", colour, 1.2, 0.66)
        + '<path d="M-12 -104 C -12 -122 12 -122 12 -104" fill="none" stroke="#2c2f33"'
        ' stroke-width="6"/>'
        + f'<path d="M-46 -84 C -66 -60 -62 -20 -50 -4" fill="none" stroke="{_css(colour, 0.5)}"'
        ' stroke-width="9" stroke-linecap="round"/>'
        f'<path d="M46 -84 C 66 -60 62 -20 50 -4" fill="none" stroke="{_css(colour, 0.5)}"'
        ' stroke-width="9" stroke-linecap="round"/>'
        '<path d="M-48 -70 C -48 -118 48 -118 48 -70 L52 -8 C 52 2 -52 2 -52 -8 Z"'
        ' fill="url(#body)"/>'
        f'<rect x="-38" y="-58" width="76" height="50" rx="10" fill="{_css(colour, 0.82)}"'
        f' stroke="{_css(colour, 0.55)}" stroke-width="2"/>'
        '<path d="M-36 -46 L36 -46" stroke="#e8e2d2" stroke-width="2.4" stroke-dasharray="4 2"/>'
        '<rect x="30" y="-48" width="4" height="12" rx="2" fill="#d8d2c2"/>'
        '<path d="M-40 -80 C -38 -100 -20 -104 -8 -105" stroke="#fff" stroke-width="4" fill="none"'
        ' opacity="0.22" stroke-linecap="round"/>'
    )


_SHAPES = {
    "mug": _mug,
    "kettle": _kettle,
    "lamp": _lamp,
    "headphones": _headphones,
    "sneaker": _sneaker,
    "backpack": _backpack,
}


def _damage(item: Item, rng: np.random.Generator) -> str:
    if item.damage == "none":
        return ""
    x, y, half_x, half_y = DAMAGE_AREAS[item.goods]
    x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    if item.damage == "scratch":
        return _scratch(x, y, half_x, half_y, rng)
    if item.damage == "crack":
        return _crack(x, y, half_x, half_y, rng)
    return _stain(x, y, half_x, half_y, rng)


def _scratch(x, y, half_x, half_y, rng: np.random.Generator) -> str:
    """Three or four parallel pale lines with a dark edge."""
    slope = rng.uniform(-0.5, 0.5)
    lines = []
    for i in range(rng.integers(3, 5)):
        offset = (i - 1.5) * 4.4
        left = x - half_x * rng.uniform(0.75, 1.0)
        right = x + half_x * rng.uniform(0.75, 1.0)
        one, two = y + offset - slope * half_x, y + offset + slope * half_x
        line = f"M{left:.1f} {one:.1f} L{right:.1f} {two:.1f}"
        lines.append(
            f'<path d="{line}" stroke="#1c1c1c" stroke-width="2.2" opacity="0.5"'
            ' transform="translate(0.6 1)" stroke-linecap="round"/>'
            f'<path d="{line}" stroke="#f6f4ee" stroke-width="1.7" stroke-linecap="round"/>'
        )
    return "".join(lines)


def _crack(x, y, half_x, half_y, rng: np.random.Generator) -> str:
    """A jagged black line with branches."""
    steps = 6
    along = np.linspace(-1, 1, steps)
    vertical = half_y > half_x
    points = []
    for i, t in enumerate(along):
        across = (1 if i % 2 else -1) * rng.uniform(0.18, 0.4)
        u, v = (across, t) if vertical else (t, across)
        points.append((x + u * half_x, y + v * half_y * 1.1))
    trunk = "M" + " L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    branches = []
    for at in (1, 3, 4):
        px, py = points[at]
        angle = rng.uniform(0, 2 * math.pi)
        length = rng.uniform(7, 12)
        branches.append(
            f"M{px:.1f} {py:.1f} l{length * math.cos(angle):.1f} {length * math.sin(angle):.1f}"
        )
    path = " ".join([trunk, *branches])
    return (
        f'<path d="{path}" fill="none" stroke="#fff" stroke-width="2" opacity="0.35"'
        ' transform="translate(1.2 1)"/>'
        f'<path d="{path}" fill="none" stroke="#0c0c0e" stroke-width="2.6"'
        ' stroke-linejoin="miter" stroke-linecap="round"/>'
    )


def _stain(x, y, half_x, half_y, rng: np.random.Generator) -> str:
    """A brown blot with a dark rim and a few drops."""
    radius = min(max(half_x, half_y), 18) * 0.8
    angles = np.linspace(0, 2 * math.pi, 11)[:-1]
    radii = radius * rng.uniform(0.72, 1.15, len(angles))
    squeeze = min(1.0, half_y / half_x + 0.25)
    corner = [
        (x + r * math.cos(a), y + squeeze * r * math.sin(a))
        for a, r in zip(angles, radii, strict=True)
    ]
    middle = [
        ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
        for a, b in zip(corner, corner[1:] + corner[:1], strict=True)
    ]
    path = f"M{middle[-1][0]:.1f} {middle[-1][1]:.1f} " + " ".join(
        f"Q{c[0]:.1f} {c[1]:.1f} {m[0]:.1f} {m[1]:.1f}" for c, m in zip(corner, middle, strict=True)
    )
    drops = "".join(
        f'<circle cx="{x + radius * rng.uniform(-1.5, 1.5):.1f}"'
        f' cy="{y + squeeze * radius * rng.uniform(0.9, 1.5):.1f}" r="{rng.uniform(1.4, 2.6):.1f}"'
        ' fill="#4a2c12" opacity="0.8"/>'
        for _ in range(4)
    )
    return (
        f'<path d="{path}Z" fill="#5a3415" opacity="0.82" stroke="#34200c" stroke-width="1.6"/>'
        f'<path d="{path}Z" fill="#8a5a2c" opacity="0.5" filter="url(#faint)"'
        f' transform="translate({x:.1f} {y:.1f}) scale(0.55) translate({-x:.1f} {-y:.1f})"/>{drops}'
    )


def _seal(seal: str) -> str:
    """A round sticker of the maker, 22 px wide: green and whole, or red, torn across."""
    if seal == "whole":
        return (
            '<circle r="11.5" fill="#fff"/><circle r="10" fill="#1f9d4d"/>'
            '<path d="M-5 0.4 L-1.4 4.2 L5.4 -3.8" fill="none" stroke="#fff" stroke-width="3"'
            ' stroke-linecap="round" stroke-linejoin="round"/>'
        )
    half = "M-11.5 0 A 11.5 11.5 0 0 1 11.5 0 L6 2.4 L2 -1.6 L-3 2 L-7 -1 Z"
    return (
        f'<g transform="translate(-1.5 -2.6) rotate(-12)"><path d="{half}" fill="#fff"/>'
        f'<path d="{half}" fill="#d3262b" transform="scale(0.86)"/></g>'
        f'<g transform="translate(1.5 3.4) rotate(172)"><path d="{half}" fill="#fff"/>'
        f'<path d="{half}" fill="#d3262b" transform="scale(0.86)"/></g>'
    )


def _box(box: str, rng: np.random.Generator) -> str:
    """A cardboard box, taped shut or with its flaps up."""
    card = _shade((190, 146, 98), rng.uniform(0.92, 1.06))
    front, right = _css(card, 1.0), _css(card, 0.76)
    shadow = '<ellipse cx="6" cy="2" rx="52" ry="8" fill="#000" opacity="0.4" filter="url(#soft)"/>'
    faces = (
        f'<path d="M-42 -62 L22 -62 L22 2 L-42 2 Z" fill="{front}"/>'
        f'<path d="M22 -62 L46 -78 L46 -16 L22 2 Z" fill="{right}"/>'
    )
    label = (
        '<rect x="-34" y="-30" width="28" height="20" fill="#f4f1ea"/>'
        '<path d="M-31 -25 H-12 M-31 -21 H-15 M-31 -17 H-12" stroke="#555" stroke-width="1.5"/>'
    )
    if box == "closed":
        top = (
            f'<path d="M-42 -62 L-18 -78 L46 -78 L22 -62 Z" fill="{_css(card, 1.16)}"/>'
            '<path d="M-16 -62 L8 -78 L20 -78 L-4 -62 L-4 -46 L-16 -46 Z" fill="#e9e2c8"'
            ' opacity="0.92"/>'
        )
        return shadow + faces + top + label
    inside = f'<path d="M-42 -62 L-18 -78 L46 -78 L22 -62 Z" fill="{_css(card, 0.34)}"/>'
    back = f'<path d="M-18 -78 L46 -78 L54 -104 L-12 -104 Z" fill="{_css(card, 0.92)}"/>'
    left = f'<path d="M-42 -62 L-18 -78 L-46 -96 L-70 -78 Z" fill="{_css(card, 1.18)}"/>'
    flap = f'<path d="M-42 -62 L22 -62 L14 -40 L-52 -40 Z" fill="{_css(card, 1.22)}"/>'
    fold = f'<path d="M22 -62 L46 -78 L72 -66 L50 -50 Z" fill="{_css(card, 1.08)}"/>'
    return shadow + faces + inside + back + left + label + flap + fold


def _gradient(name: str, colour, start: float, end: float, *, vertical: bool = False) -> str:
    direction = 'x1="0" y1="0" x2="0" y2="1"' if vertical else 'x1="0" y1="0" x2="1" y2="0.15"'
    stops = f'<stop offset="0" stop-color="{_css(colour, start)}"/>'
    stops += f'<stop offset="1" stop-color="{_css(colour, end)}"/>'
    return f'<linearGradient id="{name}" {direction}>{stops}</linearGradient>'


def _shade(colour, factor: float) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(round(float(part) * factor), 0, 255)) for part in colour)
    return red, green, blue


def _css(colour, factor: float = 1.0) -> str:
    return "#{:02x}{:02x}{:02x}".format(*_shade(colour, factor))
