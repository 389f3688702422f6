"""Where a recorded scene's camera stood: fitted to the pixel coordinates of its objects.

CLEVR's files keep world and pixel coordinates but not the camera's jitter. Three unknowns, three
numbers an object: least squares by Gauss-Newton, many scenes at once.

    minimise  sum_n |w (project(p_n, C + jitter) - pixel_n)|^2 + (0.05 |jitter|)^2

Next: data_pipelines/clevr/scene_files.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.clevr import geometry
from data_pipelines.clevr.scene import SceneObject

IMAGE_SIZES = ((320, 240), (480, 320))  # the generator's default, and the released CLEVR_v1.0
WEIGHTS = (1.0, 1.0, 30.0)  # px, px, metres: recorded pixels are rounded, depths are exact
PULL = 0.05  # px a metre of jitter: settles scenes with too few objects
STEPS = 8
CHUNK = 1024  # scenes at a time


def fit_cameras(
    scenes: Sequence[Sequence[SceneObject]],
) -> list[tuple[tuple[float, float, float], int, int]]:
    """(camera jitter in metres, image width, image height) of each scene.

    The image size is the one of IMAGE_SIZES that fits better. All objects have `pixel_coords`.
    """
    fitted = []
    for first in range(0, len(scenes), CHUNK):
        part = scenes[first : first + CHUNK]
        most = max(1, *map(len, part))
        points = np.zeros((len(part), most, 3))
        recorded = np.zeros((len(part), most, 3))
        there = np.zeros((len(part), most))
        for i, objects in enumerate(part):
            for n, thing in enumerate(objects):
                points[i, n], recorded[i, n], there[i, n] = thing.position, thing.pixel_coords, 1.0
        fits = [_fit(points, recorded, there, *size) for size in IMAGE_SIZES]
        best = np.argmin([cost for cost, _ in fits], axis=0)
        for i, choice in enumerate(best):
            x, y, z = map(float, fits[choice][1][i])
            fitted.append(((x, y, z), *IMAGE_SIZES[choice]))
    return fitted


def _fit(points, recorded, there, width, height) -> tuple[np.ndarray, np.ndarray]:
    """Sums of squared residuals [S], jitters [S, 3]; points, recorded [S, N, 3], there [S, N]."""
    count = len(points)
    weights = np.array(WEIGHTS) * there[..., None]

    def residuals(jitter):
        camera = np.add(geometry.CAMERA_POSITION, jitter)
        gap = (geometry.project(points, camera[:, None], width, height) - recorded) * weights
        return np.concatenate([gap.reshape(count, -1), PULL * jitter], axis=1)

    jitter = np.zeros((count, 3))
    for _ in range(STEPS):
        base = residuals(jitter)
        slope = np.stack([(residuals(jitter + d) - base) / 1e-4 for d in 1e-4 * np.eye(3)], axis=-1)
        square = np.einsum("srj,srk->sjk", slope, slope)
        step = np.linalg.solve(square, np.einsum("srj,sr->sj", slope, base)[..., None])[..., 0]
        jitter = jitter - step
    return np.square(residuals(jitter)).sum(axis=1), jitter
