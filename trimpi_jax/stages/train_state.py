"""What training changes: parameters, optimizer state, step. And the one optimizer step.

Only some parameters are trained (all, all but the vision tower, or the LoRA leaves). They are split
into two flat dicts by path; gradients and optimizer state exist for the trained half only.

Source: paper section 4 (AdamW, LoRA rank 8 for SFT, full parameters for VM-CPT and RL).
Next: trimpi_jax/stages/loop.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from trimpi_jax.models.lora import is_lora_leaf
from trimpi_jax.sharding import batch_degree

Params = dict[str, Any]
Flat = dict[tuple[str, ...], jax.Array]
TRAINABLE = ("all", "all_but_vision", "lora")
MOMENT_DTYPES = ("float32", "bfloat16")
BFLOAT16_MAX_B2 = 0.996  # bfloat16 keeps 8 bits: neighbours are up to 1/128 apart, half is 0.0039


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine or constant decay. Steps are optimizer updates."""

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    schedule: str = "constant"  # "constant" or "cosine" (to a tenth)
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0
    moment_dtype: str = "float32"  # of both moments between updates; the update itself is float32

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got '{self.schedule}'")
        if not self.learning_rate > 0 or self.steps < 1 or self.warmup_steps < 0:
            raise ValueError(f"learning_rate > 0, steps >= 1, warmup_steps >= 0; got {self}")
        if self.moment_dtype not in MOMENT_DTYPES:
            raise ValueError(
                f"moment_dtype must be one of {MOMENT_DTYPES}, got {self.moment_dtype!r}"
            )
        if self.moment_dtype == "bfloat16" and self.b2 > BFLOAT16_MAX_B2:
            raise ValueError(
                f"b2 {self.b2} with moment_dtype bfloat16: a moment that shrinks by less than"
                f" 1 - {BFLOAT16_MAX_B2} a step is rounded back to what it was and never shrinks."
                " Use float32 moments or a smaller b2."
            )


@flax.struct.dataclass
class TrainState:
    """Replaced, never changed. `params` is the whole tree, trained or not."""

    step: jax.Array  # int32 scalar, optimizer updates done
    params: Params
    opt_state: Any


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with its moments stored as the settings say."""
    peak, warmup = settings.learning_rate, min(settings.warmup_steps, settings.steps - 1)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(settings.steps - warmup, 1), alpha=0.1)
    else:
        after = optax.constant_schedule(peak)
    # the first update of a warm-up already moves: (i + 1) / warmup of the peak
    schedule = after
    if warmup:
        ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        schedule = optax.join_schedules([ramp, after], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        store_moments(
            optax.adamw(
                schedule,
                b1=settings.b1,
                b2=settings.b2,
                weight_decay=settings.weight_decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree),
            ),
            settings.moment_dtype,
        ),
    )


def store_moments(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner` with the arrays of its state kept in `dtype` between updates.

    The update computes in float32: XLA fuses the casts, so the wide moments never exist as arrays.
    """
    if dtype == "float32":
        return inner

    def cast(state, to):
        def one(leaf):
            return leaf.astype(to) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, state)

    def update(gradients, state, params=None):
        updates, state = inner.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def is_trained(path: tuple[str, ...], trainable: str) -> bool:
    """Whether the leaf at `path` is trained.

    Raises:
        ValueError: `trainable` is none of TRAINABLE.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {TRAINABLE}, got '{trainable}'")
    if trainable == "lora":
        return is_lora_leaf(path)
    return trainable == "all" or path[0] != "vision"


def flatten_leaves(tree: Any) -> Flat:
    """A nested dict as one dict keyed by path."""
    flat: Any = flatten_dict(tree)
    return flat


def split_params(params: Params, trainable: str) -> tuple[Flat, Flat]:
    """(trained, frozen) as flat dicts keyed by path."""
    trained: Flat = {}
    frozen: Flat = {}
    for path, leaf in flatten_leaves(params).items():
        (trained if is_trained(path, trainable) else frozen)[path] = leaf
    return trained, frozen


def join_params(trained: Flat, frozen: Flat) -> Params:
    """Inverse of `split_params`."""
    return unflatten_dict({**trained, **frozen})


def init_train_state(
    params: Params, optimizer: optax.GradientTransformation, trainable: str
) -> TrainState:
    """Step 0 with fresh optimizer state for the trained half."""
    trained, _ = split_params(params, trainable)
    return TrainState(jnp.zeros((), jnp.int32), params, _init_moments(optimizer, trained))


def _init_moments(optimizer: optax.GradientTransformation, trained: Flat) -> Any:
    """`optimizer.init`, each moment born on the devices of its weight and in its stored dtype."""
    tree = _as_tree(trained)
    meshes: dict[Any, Any] = {p: getattr(leaf, "sharding", None) for p, leaf in trained.items()}
    if not all(isinstance(place, NamedSharding) for place in meshes.values()):
        return optimizer.init(tree)  # shapes only, or one device without a mesh

    def place(path, leaf):
        names = tuple(getattr(key, "key", None) for key in path)
        found = (meshes.get(names[start:]) for start in range(len(names)))
        return next((one for one in found if one is not None), None)

    shapes = jax.eval_shape(optimizer.init, tree)
    places = jax.tree_util.tree_map_with_path(place, shapes)
    return jax.jit(optimizer.init, out_shardings=places)(tree)


def apply_gradients(
    state: TrainState,
    gradients: Flat,
    optimizer: optax.GradientTransformation,
    trainable: str,
) -> tuple[TrainState, jax.Array]:
    """One optimizer update: (new state, gradient norm before clipping)."""
    trained, frozen = split_params(state.params, trainable)
    gradient_tree = _as_tree({path: g.astype(jnp.float32) for path, g in gradients.items()})
    updates, opt_state = optimizer.update(gradient_tree, state.opt_state, _as_tree(trained))
    new_tree = optax.apply_updates(_as_tree(trained), updates)
    new_state = TrainState(state.step + 1, join_params(flatten_leaves(new_tree), frozen), opt_state)
    return new_state, optax.global_norm(gradient_tree)


def accumulate_gradients(
    loss_of: Callable[[Flat, Any], tuple[jax.Array, dict[str, jax.Array]]],
    trained: Flat,
    micro_batches: Any,
) -> tuple[Flat, dict[str, jax.Array]]:
    """Sum gradients and metrics of `loss_of(trained, micro)` over the leading axis, in float32.

    The gradients of one micro-batch have the dtype of `trained`: give the weights as they are used
    (`cast_weights`), and a bfloat16 step never holds float32 gradients unless it has to add some.

    Of a metric whose name ends in "_max" the largest is kept.

    The losses of the micro-batches add up to the loss of the step, so `loss_of` divides by the
    denominator of the whole batch, and the result does not depend on how it was cut.
    """
    gradient_of = jax.grad(loss_of, has_aux=True)
    count = jax.tree.leaves(micro_batches)[0].shape[0]
    if count == 1:  # no loop for the common case
        return gradient_of(trained, jax.tree.map(lambda leaf: leaf[0], micro_batches))
    shapes = jax.eval_shape(gradient_of, trained, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), shapes)

    def add(total, micro):
        gradients, metrics = gradient_of(trained, micro)
        joined = {
            name: jnp.maximum(total[1][name], value)
            if name.endswith("_max")
            else total[1][name] + value
            for name, value in metrics.items()
        }
        return (jax.tree.map(jnp.add, total[0], gradients), joined), None

    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return total


def split_micro_batches(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...] for every leaf; row i goes to part i mod count.

    A device holds neighbouring rows, so every part has rows of every device and none has to move.

    Args:
        batch: leaves lead with the rows.
        count: parts; 0 = as many as `count_micro_batches` says.

    Raises:
        ValueError: the rows do not split, or a part has no row for some device of the mesh.
    """
    rows, degree = jax.tree.leaves(batch)[0].shape[0], batch_degree()
    count = count_micro_batches(count, rows, degree)
    if rows % count:
        raise ValueError(f"{rows} rows do not split into {count} micro-batches")
    if count > 1 and rows // count % degree:
        raise ValueError(
            f"{rows} rows in {count} micro-batches are {rows // count} rows at a time, not a"
            f" multiple of the {degree} devices of mesh axes ('data', 'fsdp'). Use fewer"
            " micro_batches, or more of the mesh for 'tensor'."
        )
    return jax.tree.map(
        lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def count_micro_batches(setting: int, rows: int, devices: int) -> int:
    """Parts of a batch: the setting, or for 0 so many that a device works on one row at a time.

    Raises:
        ValueError: a negative setting.
    """
    if setting < 0:
        raise ValueError(f"micro_batches must be 0 (one row a device) or more, got {setting}")
    return setting or max(rows // devices, 1)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _as_tree(flat: Flat) -> Params:
    return unflatten_dict(flat)
