"""Where CLEVR's camera stands, and where a ray meets a solid.

A camera position gives the projection of world points to pixels and the rays behind pixels. All
three solids are one formula in the object's own frame (centre at the origin, half extent 1,
turned about z): two intervals along the ray, cut with each other.

    cube      slab x  and slab y  and slab z
    cylinder  circle in x, y      and slab z
    sphere    ball                            (its slab in z is opened wide)

Units: world metres, pixels with (0, 0) at the upper left corner and pixel centres at .5.
Source: facebookresearch/clevr-dataset-gen f0ce2c8, `image_generation/data/base_scene.blend` and
`blender_utils.get_camera_coords`; the formula gives the recorded `pixel_coords` of CLEVR_v1.0 back.
Next: data_pipelines/clevr/scene.py
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

CAMERA_POSITION = (7.48113, -6.50764, 5.34367)  # base_scene.blend, object "Camera"
FOCAL_PER_WIDTH = 35.0 / 32.0  # base_scene.blend: lens 35 mm, sensor 32 mm wide
OPEN_SLAB = 1.0e3  # half height of a sphere's slab: never the tighter interval


def camera_axes(camera_position: np.ndarray) -> np.ndarray:
    """Right, up and backward unit vectors of a camera that looks at the origin, [..., 3, 3].

    `z = C / |C|, x = (0, 0, 1) x z normalised, y = z x x` (Blender's Track-To with z up).
    """
    position = np.asarray(camera_position, np.float64)
    z = position / np.linalg.norm(position, axis=-1, keepdims=True)
    x = np.cross(np.broadcast_to(np.array([0.0, 0.0, 1.0]), z.shape), z)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.stack([x, np.cross(z, x), z], axis=-2)


def project(points: np.ndarray, camera_position: np.ndarray, width: int, height: int) -> np.ndarray:
    """World points [..., 3] -> float64 [..., 3]: column, row (px) and depth (metres).

    `camera_position` is [3] or broadcasts against the points, with axes of its own for each scene.

    `v = axes (p - C); px = W/2 + f v_x / -v_z; py = H/2 - f v_y / -v_z; depth = -v_z`, with
    `f = 35/32 W`. Points behind the camera have a depth below 0 and no meaningful pixel.
    """
    focal_px = FOCAL_PER_WIDTH * width
    axes = camera_axes(camera_position)
    view = np.einsum("...c,...ac->...a", np.asarray(points, np.float64) - camera_position, axes)
    depth = -view[..., 2]
    column = width / 2 + focal_px * view[..., 0] / depth
    row = height / 2 - focal_px * view[..., 1] / depth
    return np.stack([column, row, depth], axis=-1)


def ray_directions(columns, rows, axes, width: int, height: int):
    """Directions (dx, dy, dz) through pixels, scaled so that the ray parameter is the depth.

    `columns`, `rows` have one shape [...] in px; `axes` is `camera_axes`, [3, 3].
    """
    focal_px = FOCAL_PER_WIDTH * width
    right = (columns - width / 2) / focal_px
    up = (height / 2 - rows) / focal_px
    return tuple(right * axes[0, i] + up * axes[1, i] - axes[2, i] for i in range(3))


def to_local(vector, cosine, sine, inverse_radius):
    """Turn a world vector (x, y, z) into an object's frame, where its half extent is 1."""
    x, y, z = vector
    return (
        (cosine * x + sine * y) * inverse_radius,
        (cosine * y - sine * x) * inverse_radius,
        z * inverse_radius,
    )


def crossing(origin, direction, is_cube, is_sphere):
    """Ray against solid in the solid's frame: (enter, leave, clearance) along the ray.

    The ray `origin + t direction` is inside for `enter < t < leave` when `enter < leave` and
    `clearance > 0`. Where the ray passes a round solid, `enter` and `leave` still say where it
    comes closest, which is what a soft shadow wants. The two flags are bool, or 0.0 and 1.0.
    """
    is_cube, is_sphere = is_cube > 0.5, is_sphere > 0.5
    ox, oy, oz = origin
    dx, dy, dz = direction
    ball = jnp.where(is_sphere, 1.0, 0.0)
    square = jnp.maximum(dx * dx + dy * dy + ball * dz * dz, 1e-12)
    half_slope = ox * dx + oy * dy + ball * oz * dz
    offset = ox * ox + oy * oy + ball * oz * oz - 1.0
    clearance = half_slope * half_slope - square * offset
    root = jnp.sqrt(jnp.maximum(clearance, 0.0))
    per_square = 1.0 / square
    middle_x, reach_x = _slab(ox, dx, 1.0)
    middle_y, reach_y = _slab(oy, dy, 1.0)
    middle_z, reach_z = _slab(oz, dz, jnp.where(is_sphere, OPEN_SLAB, 1.0))
    square_enter = jnp.maximum(middle_x - reach_x, middle_y - reach_y)
    square_leave = jnp.minimum(middle_x + reach_x, middle_y + reach_y)
    enter = jnp.where(is_cube, square_enter, (-half_slope - root) * per_square)
    leave = jnp.where(is_cube, square_leave, (-half_slope + root) * per_square)
    enter = jnp.maximum(enter, middle_z - reach_z)
    leave = jnp.minimum(leave, middle_z + reach_z)
    return enter, leave, jnp.where(is_cube, 1.0, clearance)


def _slab(origin, direction, half):
    """The interval in which |origin + t direction| < half, as its middle and half length."""
    safe = jnp.where(jnp.abs(direction) < 1e-7, 1e-7, direction)
    inverse = 1.0 / safe
    return -origin * inverse, half * jnp.abs(inverse)


def first_hit(origin, direction, is_cube, is_sphere, nearest):
    """Ray parameter where the ray enters the solid beyond `nearest`, or inf."""
    enter, leave, clearance = crossing(origin, direction, is_cube, is_sphere)
    hit = (enter < leave) & (clearance > 0) & (enter > nearest)
    return jnp.where(hit, enter, jnp.inf)
