"""The two modules everything is made of, and the two ways to run a stack of layers.

A Linen module here only declares its weights (shape, logical axes, initializer, once) and calls a
function of `ops`. Layers of one kind are stacked on a leading axis L of every leaf; running them,
keeping caches and saving memory happen outside the modules, in plain functions.

Next: trimpi_jax/models/vision.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from trimpi_jax.ops.linear import linear
from trimpi_jax.ops.norms import rms_norm

Params = dict[str, Any]
Axis = tuple[str, int]  # logical name, size

# what the backward pass finds of a layer, by the names that the layers give their values; the rest
# is computed again. Every policy keeps the layer's input.
REMAT = {
    "none": "everything",
    "full": "nothing more",
    "attention": "queries, keys, values and what attention made of them; the MLP is run again",
    "dots": "every matrix product without a batch axis",
}


class Linear(nn.Module):
    """y = x W + b over the named axes; adds the low-rank pair where lora.py has put one."""

    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]
    use_bias: bool = False
    init_std: float = 0.02
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        normal = nn.initializers.normal(self.init_std)
        kernel = weight(self, "kernel", normal, *self.inputs, *self.outputs)
        bias = None
        if self.use_bias:
            bias = weight(self, "bias", nn.initializers.zeros_init(), *self.outputs)
        lora = None
        if not self.is_initializing() and self.has_variable("params", "lora_a"):
            lora = (
                self.get_variable("params", "lora_a"),
                self.get_variable("params", "lora_b"),
            )
        return linear(
            x,
            kernel,
            bias,
            lora,
            input_axes=len(self.inputs),
            lora_scale=self.lora_scale,
            out_dtype=out_dtype,
        )


class RMSNorm(nn.Module):
    """y = scale * x / rms(x)."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", nn.initializers.ones_init(), ("norm", self.width))
        return rms_norm(x, scale, self.eps)


def weight(module: nn.Module, name: str, initializer: Callable[..., Any], *axes: Axis) -> Any:
    """A weight of a module: its axes give both its shape and its logical names."""
    names, shape = zip(*axes, strict=True)
    return module.param(name, nn.with_logical_partitioning(initializer, names), shape)


def declare(module: nn.Module, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
    """Initial weights of one module, each boxed with its logical axes."""
    variables: Any = module.init(key, *args, **kwargs)
    return variables["params"]


def call(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """What one module makes of its unboxed weights and inputs."""
    return module.apply({"params": params}, *args, **kwargs)


def declare_stack(module: nn.Module, key: jax.Array, depth: int, *args: Any) -> Params:
    """Initial weights of `depth` equal layers, stacked on a new first axis "layers"."""
    keys = jax.random.split(key, depth)
    stacked = jax.vmap(lambda one: declare(module, one, *args))(keys)
    return jax.tree.map(
        lambda box: box.replace(names=("layers", *box.names)), stacked, is_leaf=is_box
    )


def is_box(leaf: Any) -> bool:
    """True for a weight still boxed with its logical axes."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unstack(stacked: Any) -> list[Any]:
    """[L, ...] leaves -> a list of L trees. Its gradient is one concatenation per leaf."""
    leaves, structure = jax.tree.flatten(stacked)
    depth = leaves[0].shape[0]
    pieces = [
        [piece.reshape(leaf.shape[1:]) for piece in jax.lax.split(jnp.asarray(leaf), [1] * depth)]
        for leaf in leaves
    ]
    return [structure.unflatten(layer) for layer in zip(*pieces, strict=True)]


def save_memory(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The same layer, keeping for its backward pass what REMAT says under this name.

    Raises:
      ValueError: another name.
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {tuple(REMAT)}, got {remat!r}.")
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    return jax.checkpoint(
        body,
        policy={
            "full": policies.nothing_saveable,
            "attention": policies.save_only_these_names("qkv", "attended"),
            "dots": policies.dots_with_no_batch_dims_saveable,
        }[remat],
    )


def cast_weights(params: Any, dtype: Any) -> Any:
    """Weights in the dtype of the activations, cast once instead of at every use; same results.

    The kernel of the patch embedding stays as it is: its frames are summed before they are used.

    Args:
      params: a tree of weights, nested or keyed by path.
      dtype: of the activations; gradients with respect to the cast weights have it too.
    """

    def one(path, leaf):
        keep = "patch_embed" in jax.tree_util.keystr(path) or leaf.dtype == jnp.dtype(dtype)
        return leaf if keep else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def run_layers(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    stacked: Any,
    *,
    layer_loop: str,
    remat: str,
) -> tuple[jax.Array, list[Any]]:
    """Runs `x, extra = body(x, layer)` through a stack.

    Args:
      body: one layer; `extra` may be None.
      x: what flows through.
      stacked: weights with leading axis L.
      layer_loop: "scan" compiles one layer; "unrolled" compiles L, which is faster to run where
        layers are tiny.
      remat: what the backward pass keeps of each layer, one of REMAT.

    Returns:
      (x, extras), extras a list of L.
    """
    body = save_memory(body, remat)
    if layer_loop == "unrolled":
        extras = []
        for layer in unstack(stacked):
            x, extra = body(x, layer)
            extras.append(extra)
        return x, extras
    x, extras = jax.lax.scan(body, x, stacked)
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return x, unstack(extras) if jax.tree.leaves(extras) else [None] * depth
