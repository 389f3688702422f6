"""Where the parts of decoding lie on eight devices: rows and heads cut, weights whole over fsdp."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny_model import tiny_config, tiny_params
from trimpi_jax.models import vlm
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import _join_policies
from trimpi_jax.rollouts.sampler import make_sampler, make_weight_sync
from trimpi_jax.sharding import gathered_shardings, make_mesh, param_shardings

# two key/value heads, so that "tensor" can cut them
TEXT = dataclasses.replace(tiny_config().text, kv_heads=2)
CONFIG = dataclasses.replace(tiny_config(), text=TEXT)


def shard(leaf):
    return leaf.sharding.shard_shape(leaf.shape)


def test_the_decode_copy_is_whole_over_fsdp_and_cut_over_tensor():
    mesh = make_mesh(1, 4, 2)
    params = tiny_params(CONFIG)
    placed = jax.device_put(params, param_shardings(vlm.logical_axes(CONFIG), mesh, params))
    with jax.set_mesh(mesh):
        weights = make_weight_sync(CONFIG, "bfloat16")(placed, None)
    gate, one = weights["language"]["layers"][0]["gate"]["kernel"], placed["language"]["layers"]
    assert shard(one["gate"]["kernel"])[1:] == (TEXT.width // 4, TEXT.mlp_width // 2)
    assert gate.dtype == jnp.bfloat16 and shard(gate) == (TEXT.width, TEXT.mlp_width // 2)
    np.testing.assert_array_equal(gate, one["gate"]["kernel"][0].astype(jnp.bfloat16))
    # preflight expects what the program makes
    expected = gathered_shardings(vlm.decode_axes(CONFIG), mesh, weights)
    jax.tree.map(
        lambda leaf, place: np.testing.assert_(leaf.sharding.is_equivalent_to(place, leaf.ndim)),
        weights,
        expected,
    )


def test_an_empty_cache_is_cut_over_rows_and_heads():
    mesh, rows = make_mesh(2, 2, 2), 8
    sampler = make_sampler(CONFIG, SamplerSettings(completions=3, max_new_tokens=5), 704)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        last = jax.device_put(np.ones((rows, TEXT.width), np.float32), cut)
        decoding = sampler.begin(last, np.ones(rows, bool))
    expected = (rows // 4, 3, TEXT.kv_heads // 2, 5, TEXT.head_width)
    assert shard(decoding.cache[0].k) == shard(decoding.cache[-1].v) == expected
    for name in ("hidden", "done", "tokens", "logprobs", "lengths"):
        assert shard(getattr(decoding, name))[0] == rows // 4, name


def test_copies_of_a_policy_lie_where_their_prompts_do():
    mesh = make_mesh(4, 1, 2)
    one = jnp.arange(6 * TEXT.kv_heads * 4.0).reshape(1, 6, TEXT.kv_heads, 4)
    with jax.set_mesh(mesh):
        ((k, v),) = jax.jit(_join_policies)(
            [[(one, -one)], [(2 * one, one)]], np.array([1, 1, 0, 0])
        )
    assert shard(k) == shard(v) == (1, 6, TEXT.kv_heads // 2, 4)
    np.testing.assert_array_equal(k, jnp.concatenate([2 * one, 2 * one, one, one]))
