"""First leg of the nano base: the vision tower learns what is in every cell of a picture.

    z = W v + b        v one visual token; z logits of 2 x (there, color, size, material, shape)
    L = CE(there) + mean over objects of the sum of CE(attribute)

A caption tells a tower of random weights very little about where to look; a label for every cell
tells it everything, and no language model has to run. The heads W are thrown away afterwards.

Next: trimpi_jax/stages/nano_reading.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.nano_base.pictures import FIELD_SIZES, FIELDS, SLOTS, Pictures
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.packing import pack_images
from trimpi_jax.models.vision import encode_patches

HEAD_WIDTH = SLOTS * sum(FIELD_SIZES)
THERE_WEIGHT = 4.0  # most cells are empty
ENCODE_ROWS = 256


class PatchSet(NamedTuple):
    """Pictures of one size as patches; the layout is the same for all of them."""

    patches: np.ndarray  # uint8 [N, W, P, C * patch * patch]
    patch_hw: np.ndarray  # int32 [W, P, 2]
    segment: np.ndarray  # int32 [W, P]
    slots: np.ndarray  # int32 [cells], slot of each cell, row by row


@dataclasses.dataclass(frozen=True)
class PerceptionSettings:
    """Pictures a step."""

    scenes: int
    lone: int
    seed: int


def make_patches(pictures: Pictures, config: VLMConfig) -> PatchSet:
    """All pictures cut into patches, window-major."""
    first = pack_images([pictures.pixels[0]], config.vision)
    patches = np.empty((len(pictures.pixels), *first.patches.shape), np.uint8)
    for number, image in enumerate(pictures.pixels):
        patches[number] = pack_images([image], config.vision).patches
    return PatchSet(patches, first.patch_hw, first.patch_segment, first.slots[0])


def init_heads(config: VLMConfig, key: jax.Array) -> dict[str, jax.Array]:
    """The throw-away heads."""
    std = config.text.init_std
    kernel = std * jax.random.normal(key, (config.text.width, HEAD_WIDTH))
    return {"kernel": kernel, "bias": jnp.zeros(HEAD_WIDTH)}


def see(params: Any, config: VLMConfig, patches: jax.Array, layout: PatchSet) -> jax.Array:
    """Visual tokens [N, cells, D], cells row by row, of uint8 patches [N, W, P, ...]."""
    count = patches.shape[0]

    def each(leaf):
        return jnp.broadcast_to(leaf, (count, *leaf.shape))

    visual = encode_patches(
        params,
        config.vision,
        patches,
        each(jnp.asarray(layout.patch_hw)),
        each(jnp.asarray(layout.segment)),
        dtype=jnp.dtype(jnp.float32),
        layer_loop=config.layer_loop,
        remat="none",
        attention=config.attention,
    )
    return visual[:, layout.slots]


def cell_loss(
    visual: jax.Array, heads: dict[str, jax.Array], labels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the module docstring, and the share of right answers per field.

    Args:
        visual: [N, cells, D].
        heads: from `init_heads`.
        labels: int [N, cells, SLOTS, fields].
    """
    logits = visual @ heads["kernel"] + heads["bias"][None, None]
    logits = logits.reshape(*visual.shape[:2], SLOTS, -1)
    labels = labels.astype(jnp.int32)
    there = labels[..., 0] > 0
    loss, start, metrics = 0.0, 0, {}
    for field, size in enumerate(FIELD_SIZES):
        z, start = logits[..., start : start + size], start + size
        nats = optax.softmax_cross_entropy_with_integer_labels(z, labels[..., field])
        right = z.argmax(-1) == labels[..., field]
        counts = there if field else jnp.ones_like(there)
        share = counts / jnp.maximum(counts.sum(), 1)
        loss += (THERE_WEIGHT if not field else 1.0) * (nats * share).sum()
        metrics[f"train/{'there' if not field else FIELDS[field - 1]}"] = (right * share).sum()
    return jnp.asarray(loss), metrics


def make_perception_step(
    config: VLMConfig,
    optimizer: optax.GradientTransformation,
    scenes: PatchSet,
    lone: PatchSet,
) -> Callable[..., Any]:
    """A jitted `step(state, batch) -> (state, metrics)`; state = (vision and heads, moments)."""

    def step(state, batch):
        (params, opt_state), (scene, scene_labels, crop, crop_labels) = state, batch

        def loss_of(params):
            loss, metrics = cell_loss(
                see(params["vision"], config, scene, scenes), params["heads"], scene_labels
            )
            crops = see(params["vision"], config, crop, lone)
            more, crop_metrics = cell_loss(crops, params["heads"], crop_labels)
            metrics |= {name.replace("/", "/lone_"): v for name, v in crop_metrics.items()}
            return loss + 0.5 * more, metrics

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        metrics |= {"train/loss": loss, "train/grad_norm": optax.global_norm(gradients)}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def perception_batch(
    step: int,
    settings: PerceptionSettings,
    scenes: tuple[PatchSet, np.ndarray],
    lone: tuple[PatchSet, np.ndarray],
) -> tuple[np.ndarray, ...]:
    """(scene patches, labels, lone patches, labels) of a step: a pure function of seed and step."""
    rng = np.random.default_rng([settings.seed, 31, step])
    batch = []
    for (patches, labels), count in ((scenes, settings.scenes), (lone, settings.lone)):
        chosen = rng.integers(len(labels), size=count)
        batch += [patches.patches[chosen], labels[chosen]]
    return tuple(batch)


def rescale_visual(params: Any, config: VLMConfig, pictures: PatchSet, rms: float) -> Any:
    """The tower with its last map scaled so that visual tokens have this root mean square.

    The first leg makes them a hundred times larger than a young language model's embeddings, and
    what its layers add to them would be lost in the rounding of the residual stream.
    """
    seen = np.asarray(see(params, config, jnp.asarray(pictures.patches[:ENCODE_ROWS]), pictures))
    factor = float(rms / np.sqrt((seen**2).mean()))
    last = jax.tree.map(lambda leaf: leaf * factor, params["merger"]["fc2"])
    return {**params, "merger": {**params["merger"], "fc2": last}}


def encode_all(params: Any, config: VLMConfig, pictures: PatchSet) -> np.ndarray:
    """Visual tokens of every picture, float32 [N, cells, D], for a leg that trains no tower."""
    encode = jax.jit(lambda params, patches: see(params, config, patches, pictures))
    cells = len(pictures.slots)
    visual = np.empty((len(pictures.patches), cells, config.text.width), np.float32)
    for start in range(0, len(visual), ENCODE_ROWS):
        part = pictures.patches[start : start + ENCODE_ROWS]
        fill = np.pad(part, [(0, ENCODE_ROWS - len(part))] + [(0, 0)] * 3)
        visual[start : start + len(part)] = np.asarray(encode(params, fill))[: len(part)]
    return visual
