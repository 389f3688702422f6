"""Which device holds what: the mesh, and the rules from logical axes to mesh axes.

A weight names its axes by meaning ("embed", "heads"), once, where it is declared. This file alone
says which mesh axis each meaning is cut over:

    data    copies of the weights, different rows
    fsdp    different rows too; weights and optimizer state are cut over it and gathered when used
    tensor  heads, MLP columns and vocabulary are cut over it; activations are exchanged

What used to be spelled `pjit` is `jax.jit` with shardings today: put parameters and batch on the
mesh with these shardings, call the jitted step under `jax.set_mesh(mesh)`, and XLA partitions it.

Next: trimpi_jax/ops/norms.py
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# logical axis -> mesh axis; None = never cut
LOGICAL_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,
    "length": None,
    # language model
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "mlp": "tensor",
    "norm": None,
    "lora_rank": None,
    # vision tower
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "vision_cell": "fsdp",
    "qkv": None,
    "channel": None,
    "frame": None,
    "pixel": None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of axes ("data", "fsdp", "tensor").

    Args:
      data, fsdp, tensor: devices along each axis; -1, at most once, means all that are left.
      devices: the devices to use; all of every host by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = len(devices) if devices is not None else jax.device_count()
    wild = [name for name, size in sizes.items() if size == -1]
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(wild) > 1:
        raise ValueError(
            f"Mesh sizes must be positive, and at most one may be -1 (the rest); got {sizes}."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if wild:
        if count % fixed:
            others = {name: size for name, size in sizes.items() if size != -1}
            raise ValueError(
                f"{count} devices cannot be split over mesh axes {others}: {fixed} does not "
                f"divide {count}. The nearest that fits: {_as_flags(nearest_mesh(sizes, count))}"
            )
        sizes[wild[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"Mesh {sizes} needs {fixed} devices, but there are {count}. The nearest that fits: "
            f"{_as_flags(nearest_mesh(sizes, count))} (-1 on one axis takes the rest)"
        )
    # Auto axes: XLA propagates shardings; the default since JAX 0.9 is Explicit
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, types, devices=devices)
    except NotImplementedError:  # a TPU's torus has no axis of such a size: cut one of its axes
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)


def nearest_mesh(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The mesh of exactly `count` devices that is nearest to the wanted sizes.

    Nearest is the smallest Σ |log₂(size / wanted)| over the axes; of equal ones the one that leaves
    `tensor` alone, then `fsdp`: they decide what fits into memory.

    Args:
        sizes: wanted per axis of MESH_AXES; -1 = any.
        count: devices.
    """
    divisors = [size for size in range(1, count + 1) if count % size == 0]

    def distance(mesh: dict[str, int]) -> tuple[float, ...]:
        off = {
            name: abs(math.log2(mesh[name] / sizes[name])) if sizes[name] > 0 else 0.0
            for name in MESH_AXES
        }
        return (round(sum(off.values()), 6), off["tensor"], off["fsdp"])

    return min(
        (
            {"data": count // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
            for fsdp in divisors
            for tensor in divisors
            if count % (fsdp * tensor) == 0
        ),
        key=distance,
    )


def _as_flags(sizes: Mapping[str, int]) -> str:
    return " ".join(f"--config.mesh.{name}={size}" for name, size in sizes.items())


def param_shardings(axes_tree: Any, mesh: Mesh, shapes: Any) -> Any:
    """NamedSharding of every weight.

    Args:
      axes_tree: tree whose leaves are tuples of logical axis names, as `vlm.logical_axes` gives.
      mesh: from `make_mesh`.
      shapes: the same tree with leaves that have a `.shape`.

    Raises:
      ValueError: an unknown logical axis, or sizes that the mesh does not divide, all in one
        message with the degrees that work (key/value heads are the usual limit of `tensor`).
    """
    problems: dict[str, None] = {}  # ordered and without repeats
    shardings = jax.tree.map(
        lambda axes, leaf: _sharding(axes, leaf, mesh, problems),
        axes_tree,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    _raise_all(problems)
    return shardings


def state_shardings(state: Any, axes_tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a training state, or of any tree that holds copies of weights.

    A leaf whose path ends like the path of a weight (the weight itself, its optimizer moments) lies
    like that weight; counters and the like are whole on every device.

    Args:
      state: leaves need only a `.shape`.
      axes_tree: logical axes of the weights, nested dicts.
      mesh: from `make_mesh`.

    Raises:
      ValueError: see `param_shardings`.
    """
    problems: dict[str, None] = {}
    axes_leaves = jax.tree_util.tree_leaves_with_path(
        axes_tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    by_path = {tuple(key.key for key in path): axes for path, axes in axes_leaves}

    def one(path, leaf):
        names = tuple(getattr(key, "key", None) for key in path)
        for start in range(len(names)):
            if names[start:] in by_path:
                return _sharding(by_path[names[start:]], leaf, mesh, problems)
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(one, state)
    _raise_all(problems)
    return shardings


def _sharding(axes: tuple[str, ...], leaf: Any, mesh: Mesh, problems: dict[str, None]) -> Any:
    unknown = [name for name in axes if name not in LOGICAL_RULES]
    if unknown or len(axes) != len(leaf.shape):
        problems[f"logical axes {axes} do not fit shape {tuple(leaf.shape)}"] = None
        return None
    for name, size in zip(axes, leaf.shape, strict=True):
        rule = LOGICAL_RULES[name]
        degree = mesh.shape[rule] if isinstance(rule, str) else 1
        if size % degree:
            fits = [d for d in range(1, mesh.size + 1) if size % d == 0]
            problems[
                f"{name} has {size} entries, not divisible by {rule}={degree} (of up to "
                f"{mesh.size} devices, {rule} may be {fits})"
            ] = None
    return NamedSharding(mesh, PartitionSpec(*(LOGICAL_RULES[name] for name in axes)))


def _raise_all(problems: dict[str, None]) -> None:
    if problems:
        raise ValueError("Weights cannot be laid out on the mesh: " + "; ".join(problems) + ".")


def batch_degree() -> int:
    """Devices that the rows of a batch lie over, by the mesh in context; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over "data" and "fsdp"; every leaf of a Batch leads with B, so it fits all of them."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells XLA how an activation lies on the mesh; without a mesh in context, returns x.

    Args:
      x: any array.
      axes: logical names of its first axes (None = leave to XLA); an axis that its mesh axes do
        not divide is left to XLA as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = PartitionSpec.UNCONSTRAINED
    spec = [_mesh_axes(name, size, mesh) or free for name, size in zip(axes, x.shape, strict=False)]
    spec += [free] * (x.ndim - len(spec))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_weights(weights: Any, axes_tree: Any) -> Any:
    """Weights as they are used: whole over "fsdp", still cut over "tensor".

    For weights that are used many times in one program (decoding) or by an index (the embedding),
    where XLA would otherwise move activations or gather them again and again. Without a mesh in
    context, returns its input.

    Args:
      weights: arrays inside `jax.jit`.
      axes_tree: the same tree with tuples of logical axis names as leaves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return weights

    def one(axes, leaf):
        return jax.lax.with_sharding_constraint(leaf, _gathered_spec(axes, leaf, mesh))

    return jax.tree.map(one, axes_tree, weights, is_leaf=lambda x: isinstance(x, tuple))


def gathered_shardings(axes_tree: Any, mesh: Mesh, shapes: Any) -> Any:
    """NamedSharding of every weight that `gather_weights` has been given."""
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(mesh, _gathered_spec(axes, leaf, mesh)),
        axes_tree,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _gathered_spec(axes: tuple[str, ...], leaf: Any, mesh: Any) -> PartitionSpec:
    spec = (
        () if LOGICAL_RULES[name] == "fsdp" else _mesh_axes(name, size, mesh)
        for name, size in zip(axes, leaf.shape, strict=True)
    )
    return PartitionSpec(*(names or None for names in spec))


def on_shards(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[tuple]
) -> jax.Array:
    """`function(*arrays)` on every device's part of the arrays: how a kernel meets the mesh.

    XLA cannot partition a kernel that it cannot see into. Without a mesh in context this is a plain
    call.

    Args:
      function: the rows and heads of its result do not mix; the result lies like the first array.
      arrays: what it takes.
      axes: per array the logical name of each axis, None = whole on every device; so is an axis
        that its mesh axes do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    specs = tuple(
        PartitionSpec(
            *(
                _mesh_axes(name, size, mesh) or None
                for name, size in zip(names, array.shape, strict=True)
            )
        )
        for names, array in zip(axes, arrays, strict=True)
    )
    split = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(*arrays)


def _mesh_axes(name: str | None, size: int, mesh: Any) -> tuple[str, ...]:
    """The mesh axes that an axis of `size` entries is cut over; none when they do not divide it."""
    rule = LOGICAL_RULES[name] if name is not None else None
    names = (rule,) if isinstance(rule, str) else tuple(rule or ())
    return names if size % math.prod(mesh.shape[n] for n in names) == 0 else ()


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which part of every batch is this process's.

    The rows of a batch lie over the devices of ("data", "fsdp") in equal blocks. A share is the
    blocks of the devices of one process; where "tensor" crosses hosts, processes hold the same one.

        data=2 fsdp=2 on 2 processes    rows 0-3 of 8: process 0    4-7: process 1
    """

    number: int  # this process's share
    count: int  # shares
    leaders: tuple[int, ...]  # per share the first process that holds it
    blocks: tuple[int, ...]  # row blocks of this share, ascending
    degree: int  # blocks of all shares

    def part(self, rows: int) -> int:
        """This process's rows of `rows`."""
        return rows // self.count

    def of_leaders(self, told: Sequence[Any]) -> list[Any]:
        """Of what every process said, one of each share."""
        return [told[process] for process in self.leaders]

    def global_rows(self, rows: int) -> np.ndarray:
        """int32, where this process's rows stand in a batch of `rows`."""
        block = rows // self.degree
        starts = np.asarray(self.blocks, np.int32)[:, None] * block
        return (starts + np.arange(block, dtype=np.int32)[None]).reshape(-1)


@functools.lru_cache
def row_share(mesh: Mesh) -> RowShare:
    """The share of this process.

    Raises:
      ValueError: processes that share some of their rows, or have more rows than others.
    """
    grid = mesh.devices.reshape(-1, mesh.shape["tensor"])  # [block, tensor]
    held: dict[int, list[int]] = {}
    for block, devices in enumerate(grid):
        for process in dict.fromkeys(device.process_index for device in devices):
            held.setdefault(process, []).append(block)
    shares = sorted(set(map(tuple, held.values())))
    if sum(map(len, shares)) != len(grid) or len({len(share) for share in shares}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} deals the rows of a batch unevenly over the processes (blocks"
            f" of rows by process: {held}); let --config.mesh.tensor divide the devices of a host,"
            " or be a multiple of them"
        )
    first = {share: min(p for p in held if tuple(held[p]) == share) for share in shares}
    own = tuple(held[jax.process_index()])
    leaders = tuple(first[share] for share in shares)
    return RowShare(shares.index(own), len(shares), leaders, own, len(grid))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A tree of host arrays whose leaves lead with this process's rows, laid over the mesh.

    Raises:
      ValueError: the rows do not divide over the devices of the batch axes.
    """
    share = row_share(mesh)
    degree = len(share.blocks)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % degree:
        here = f" of this process (of {share.count})" if share.count > 1 else ""
        raise ValueError(
            f"{rows} rows are not divisible by the {degree} devices of mesh axes ('data', 'fsdp')"
            f"{here}. Use a multiple of {degree}, or change --config.mesh."
        )
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def one(leaf):
        leaf = np.asarray(leaf)
        shape = (rows * share.count, *leaf.shape[1:])
        block = shape[0] // share.degree

        def part(index):
            start = share.blocks.index((index[0].start or 0) // block) * block
            return leaf[start : start + block]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)


def place_whole(tree: Any, mesh: Mesh) -> Any:
    """Host arrays that all processes have alike, whole on every device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)


def fetch_rows(tree: Any, mesh: Mesh) -> Any:
    """The inverse of `place_batch`: this process's rows, as numpy.

    Rows that XLA has left on devices of other processes are laid where they belong first.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    share = row_share(mesh)

    def one(leaf):
        own = share.global_rows(leaf.shape[0])
        found = _read_rows(leaf, own)
        return _read_rows(_lay_rows(leaf, batch_sharding(mesh)), own) if found is None else found

    return jax.tree.map(one, tree)


def _read_rows(leaf: jax.Array, rows: np.ndarray) -> np.ndarray | None:
    """The rows from the devices of this process; None where it does not hold them all."""
    found = np.zeros((len(rows), *leaf.shape[1:]), leaf.dtype)
    filled = np.zeros(found.shape, bool)
    for shard in leaf.addressable_shards:
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        mine = np.flatnonzero((rows >= start) & (rows < stop))
        where = (mine, *shard.index[1:])
        found[where] = np.asarray(shard.data)[rows[mine] - start]
        filled[where] = True
    return found if filled.all() else None


@functools.partial(jax.jit, static_argnums=1)
def _lay_rows(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, sharding)
