"""Which tiles of a picture can show an object at all: what is not listed is never ray-traced.

Each solid is put into a convex hull of a few points (its corners; a prism around the cylinder, a
dodecahedron around the sphere). The hull's shadow on eight directions of the image plane is held
against the tile's: where one pair of shadows is apart, the tile cannot show the object. A tile too
many costs time, a tile too few would be a hole, so every step errs on the large side.

Next: data_pipelines/clevr/renderer.py
"""

from __future__ import annotations

import numpy as np

from data_pipelines.clevr import geometry

DIRECTIONS = 8  # of the image plane; 2 are the bounding box
MARGIN_PX = 0.01  # for rounding
POINTS = 20


def touched_tiles(
    packed: dict[str, np.ndarray], width: int, height: int, tile: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scene, tile row, tile column) of the tiles that can show an object, int [N] each.

    `packed` is `scene.pack_solids`; a tile is `tile` px a side.
    """
    low, high = _shadows(packed, width, height)  # [B, slots, DIRECTIONS]
    x0, y0 = np.arange(0, width, tile), np.arange(0, height, tile)
    across = (low[..., :1] < x0 + tile) & (high[..., :1] > x0)
    half = DIRECTIONS // 2  # a quarter turn: the rows
    down = (low[..., half : half + 1] < y0 + tile) & (high[..., half : half + 1] > y0)
    boxed = np.einsum("bny,bnx->byx", down.astype(np.int32), across.astype(np.int32)) > 0
    scene, row, column = np.nonzero(boxed)
    axes = _axes()
    reach = 0.5 * tile * np.abs(axes).sum(axis=1)
    centre = np.stack([x0[column], y0[row]], axis=1) + 0.5 * tile
    shadow = centre @ axes.T  # [N, DIRECTIONS]
    meets = np.zeros(len(scene), bool)
    for slot in range(low.shape[1]):
        apart = (low[scene, slot] > shadow + reach) | (high[scene, slot] < shadow - reach)
        meets |= ~apart.any(axis=1)
    return scene[meets], row[meets], column[meets]


def _shadows(packed, width, height) -> tuple[np.ndarray, np.ndarray]:
    """Each solid's hull on each direction, px: (low, high) [B, slots, DIRECTIONS]."""
    shape = np.where(packed["is_sphere"] > 0.5, 2, np.where(packed["is_cube"] > 0.5, 0, 1))
    points = _hulls()[shape]  # [B, slots, POINTS, 3]
    c, s, r = (packed[name][..., None] for name in ("cosine", "sine", "radius"))
    x = packed["x"][..., None] + r * (c * points[..., 0] - s * points[..., 1])
    y = packed["y"][..., None] + r * (s * points[..., 0] + c * points[..., 1])
    z = packed["z"][..., None] + r * points[..., 2]
    camera = packed["camera"][:, None, None]
    view = np.einsum("bnkc,bac->bnka", np.stack([x, y, z], -1) - camera, packed["axes"])
    depth = np.maximum(-view[..., 2], 1e-3)
    focal_px = geometry.FOCAL_PER_WIDTH * width
    px = width / 2 + focal_px * view[..., 0] / depth
    py = height / 2 - focal_px * view[..., 1] / depth
    along = np.einsum("bnkp,dp->bnkd", np.stack([px, py], axis=-1), _axes())
    low, high = along.min(axis=2) - MARGIN_PX, along.max(axis=2) + MARGIN_PX
    real = (packed["z"] > -1)[..., None]  # empty slots lie far below the ground
    return np.where(real, low, np.inf), np.where(real, high, -np.inf)


def _axes() -> np.ndarray:
    """Unit directions of the image plane, half a turn in equal steps from +x: [DIRECTIONS, 2]."""
    angle = np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _hulls() -> np.ndarray:
    """Points around the cube, the cylinder and the sphere of half extent 1: [3, POINTS, 3]."""
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], float)
    golden = (1 + 5**0.5) / 2
    # around the circle a polygon of 10 corners, around the ball a dodecahedron
    turn = 2 * np.pi * np.arange(10) / 10
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) / np.cos(np.pi / 10)
    prism = np.concatenate([np.insert(ring, 2, height, axis=1) for height in (-1.0, 1.0)])
    planes = [(0, i / golden, j * golden) for i in (-1, 1) for j in (-1, 1)]
    corners = np.concatenate([signs, *(np.roll(planes, shift, axis=1) for shift in range(3))])
    inside = golden**2 / (1 + golden**2) ** 0.5  # its inscribed ball
    cube = np.concatenate([signs, signs, signs[:4]])
    return np.stack([cube, prism, corners / inside])
