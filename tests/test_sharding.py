"""Eight devices give the numbers of one; meshes and layouts that cannot work say why."""

import dataclasses
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.parity.rows import LAYOUTS, make_batch, make_row, random_params, tiny_config
from trimpi_jax.io.checkpoints import open_checkpoints, restore_latest, save_checkpoint
from trimpi_jax.models import lora, vlm
from trimpi_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    constrain,
    make_mesh,
    nearest_mesh,
    param_shardings,
    place_batch,
    row_share,
    state_shardings,
)
from trimpi_jax.stages.supervised import StepSettings, make_supervised_step
from trimpi_jax.stages.train_state import OptimizerSettings, init_train_state, make_optimizer


def loss(params, config, batch):
    visual = vlm.encode_images(
        params, config, batch.patches, batch.patch_hw, batch.patch_segment, remat="full"
    )
    hidden = vlm.hidden_states(
        params,
        config,
        batch.tokens,
        batch.positions,
        batch.lengths,
        visual,
        batch.visual_index,
        remat="full",
    )
    logprobs, _ = vlm.token_logprobs(params, config, hidden[:, :-1], batch.tokens[:, 1:], 128)
    counts = jnp.arange(1, batch.tokens.shape[1])[None] < batch.lengths[:, None]
    return -jnp.sum(jnp.where(counts, logprobs, 0.0)) / jnp.sum(counts)


GRADIENT = jax.jit(jax.value_and_grad(loss), static_argnums=1)


@pytest.fixture(scope="module")
def problem():
    config = tiny_config(tied=False)
    params = random_params(config)
    adapted = lora.add_lora(params, config, jax.random.key(0), 4)
    batch = make_batch([make_row(layout) for layout in LAYOUTS], config)
    return config, jax.device_get(adapted), batch


@pytest.fixture(scope="module")
def alone(problem):
    config, params, batch = problem
    return GRADIENT(params, config, batch)


def test_eight_devices_are_one(problem, alone):
    config, params, batch = problem
    mesh = make_mesh(2, 2, 2)
    axes = lora.lora_axes(vlm.logical_axes(config), config)
    shardings = param_shardings(axes, mesh, params)
    kernel = shardings["language"]["layers"]["q"]["kernel"]
    assert kernel.spec == PartitionSpec(None, "fsdp", "tensor", None)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rows = jax.device_put(batch, batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, shardings))
        value, gradients = step(placed, config, rows)
    assert float(value) == pytest.approx(float(alone[0]), abs=1e-6)

    def near(ours, theirs):
        scale = np.abs(theirs).max() + 1e-6
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-5, rtol=0)

    jax.tree.map(near, jax.device_get(gradients), jax.device_get(alone[1]))


def test_weights_are_born_on_the_mesh(problem):
    config = problem[0]
    mesh = make_mesh(-1, 2, 2)
    shardings = param_shardings(vlm.logical_axes(config), mesh, vlm.param_shapes(config))

    def one(tree):  # a single weight: the others are then not computed
        return tree["language"]["layers"]["up"]["kernel"]

    with jax.set_mesh(mesh):
        init = jax.jit(lambda key: one(vlm.init_params(config, key)), out_shardings=one(shardings))
        up = init(jax.random.key(0))  # [L, D / fsdp, F / tensor]
    assert up.addressable_shards[0].data.shape == (2, 32, 48)


def test_mesh_shapes():
    assert dict(make_mesh(-1, 1, 1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(1, -1, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert make_mesh(1, 1, 1, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "needs 3 devices, but there are 8"),
        ((-1, 3, 1), "8 devices cannot be split.*3 does not divide 8"),
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "positive"),
    ],
)
def test_bad_meshes(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*shape)


@pytest.mark.parametrize(
    ("wanted", "count", "nearest"),
    [
        ((1, 8, 1), 4, (1, 4, 1)),
        ((3, 1, 1), 8, (8, 1, 1)),  # as far as (4, 1, 2), and tensor is left alone
        ((3, 1, 2), 8, (4, 1, 2)),
        ((2, 4, 2), 8, (1, 4, 2)),  # tensor and fsdp decide what fits into memory
        ((-1, 3, 1), 8, (2, 4, 1)),
        ((1, 1, 8), 7, (1, 1, 7)),
        ((1, 8, 1), 1, (1, 1, 1)),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_the_nearest_that_does(wanted, count, nearest):
    sizes = dict(zip(("data", "fsdp", "tensor"), wanted, strict=True))
    assert tuple(nearest_mesh(sizes, count).values()) == nearest


def test_the_nearest_mesh_stands_in_the_message_as_flags():
    flags = "--config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=2"
    with pytest.raises(ValueError, match=flags):
        make_mesh(3, 1, 2)


def test_too_many_tensor_devices_for_the_heads(problem):
    config = problem[0]
    with pytest.raises(ValueError, match=r"kv_heads has 2 entries.*tensor=4.*may be \[1, 2\]"):
        param_shardings(vlm.logical_axes(config), make_mesh(1, 2, 4), vlm.param_shapes(config))


def test_constrain():
    x = jnp.ones((4, 3))
    assert constrain(x, "batch") is x  # no mesh in context
    with jax.set_mesh(make_mesh(2, 2, 2)):
        y = jax.jit(lambda a: constrain(a * 2, "batch"))(x)
        assert y.sharding.shard_shape(y.shape) == (1, 3)
        odd = jax.jit(lambda a: constrain(a * 2, "batch"))(jnp.ones((3, 3)))  # left to XLA
        np.testing.assert_array_equal(odd, 2.0)


def test_a_step_with_half_moments_restored_onto_another_mesh(tmp_path):
    """Two updates on one device; one on (2, 2, 2), saved, and one on (1, 4, 2)."""
    config = tiny_config()
    batch = make_batch([make_row("text_only", seed) for seed in range(4)], config)
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & (batch.tokens % 2 == 0))
    params = random_params(config)
    optimizer = make_optimizer(OptimizerSettings(1e-2, steps=4, moment_dtype="bfloat16"))

    def place(mesh, tree):
        tree = jax.device_get(tree)  # or donation would delete what they share
        return jax.device_put(tree, state_shardings(tree, vlm.logical_axes(config), mesh))

    settings = StepSettings("all", remat="attention", logprob_chunk=64)
    step = make_supervised_step(config, optimizer, settings)

    fresh = init_train_state(jax.tree.map(jnp.asarray, params), optimizer, "all")
    expected, _ = step(jax.tree.map(jnp.copy, fresh), batch)
    expected, metrics = step(expected, batch)

    manager = open_checkpoints(tmp_path)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        state, _ = step(place(mesh, fresh), place_batch(batch, mesh))
        kernel = state.params["language"]["layers"]["q"]["kernel"]
        moments = optax.tree_utils.tree_get(state.opt_state, "nu")
        moment = moments["language"]["layers"]["q"]["kernel"]
        assert kernel.sharding.spec == moment.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert moment.dtype == jnp.bfloat16
    save_checkpoint(manager, 1, state, {})
    manager.wait_until_finished()

    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        restored = restore_latest(manager, place(mesh, fresh))
        assert restored is not None
        state, _, number = restored
        assert number == 1
        kernel = state.params["language"]["layers"]["q"]["kernel"]
        assert kernel.sharding.mesh.shape["fsdp"] == 4
        state, ours = step(state, place_batch(batch, mesh))
    manager.close()
    assert float(ours["train/loss"]) == pytest.approx(float(metrics["train/loss"]), abs=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),  # a bfloat16 moment is 1/256 off
        jax.device_get(state.params),
        jax.device_get(expected.params),
    )


# ---- which rows are whose


class FakeDevice(NamedTuple):
    """What a mesh needs to know of a device."""

    id: int
    process_index: int


def share_of(shape, per_process, process, monkeypatch):
    """The share of a process that has so many of the devices, one after the other."""
    count = math.prod(shape)
    grid = np.empty(count, object)
    grid[:] = [FakeDevice(i, i // per_process) for i in range(count)]
    mesh = types.SimpleNamespace(
        devices=grid.reshape(shape), shape=dict(zip(MESH_AXES, shape, strict=True))
    )
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return row_share.__wrapped__(mesh)


@pytest.mark.parametrize(
    ("shape", "per_process", "shares", "rows"),
    [
        ((2, 2, 1), 2, 2, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        ((1, 4, 1), 1, 4, {0: [0, 1], 3: [6, 7]}),
        ((1, 2, 2), 2, 2, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
        # tensor over two hosts: both hold the same rows
        ((1, 2, 2), 1, 2, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [4, 5, 6, 7]}),
        ((1, 1, 4), 2, 1, {0: list(range(8)), 1: list(range(8))}),
    ],
)
def test_rows_of_processes_by_hand(shape, per_process, shares, rows, monkeypatch):
    for process, expected in rows.items():
        share = share_of(shape, per_process, process, monkeypatch)
        assert share.count == shares
        assert share.part(8) == 8 // shares
        assert share.global_rows(8).tolist() == expected
        told = [f"process {i}" for i in range(math.prod(shape) // per_process)]
        assert len(share.of_leaders(told)) == shares


def test_rows_that_would_be_dealt_unevenly_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="deals the rows of a batch unevenly"):
        share_of((1, 3, 2), 3, 0, monkeypatch)  # the second block lies on two processes
