"""What training changes and what it must not; warm-up numbers; parts that add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.train_state import (
    OptimizerSettings,
    accumulate_gradients,
    apply_gradients,
    init_train_state,
    is_trained,
    join_params,
    make_optimizer,
    split_micro_batches,
    split_params,
)


def make_params(*, lora=True):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    layer = {"q": {"kernel": draw(2, 3, 4)}}
    if lora:
        layer["q"] |= {"lora_a": draw(2, 3, 2), "lora_b": draw(2, 2, 4)}
    return {
        "vision": {"patch": {"kernel": draw(1, 3, 3)}},
        "language": {"embed": {"embedding": draw(5, 3)}, "layers": layer},
    }


EMBED = ("language", "embed", "embedding")
KERNEL = ("language", "layers", "q", "kernel")
LORA = {("language", "layers", "q", "lora_a"), ("language", "layers", "q", "lora_b")}
VISION = ("vision", "patch", "kernel")

TRAINED = {
    "lora": LORA,
    "all": {EMBED, KERNEL, VISION} | LORA,
    "all_but_vision": {EMBED, KERNEL} | LORA,
}


@pytest.mark.parametrize("trainable", TRAINED)
def test_the_split_is_by_path_and_joins_again(trainable):
    params = make_params()
    trained, frozen = split_params(params, trainable)
    assert set(trained) == TRAINED[trainable]
    assert not set(trained) & set(frozen)
    joined = join_params(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, params))


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match=r"trainable must be one of .* got 'some'"):
        is_trained(("vision",), "some")


@pytest.mark.parametrize("trainable", TRAINED)
def test_what_is_not_trained_stays_the_same_bit_by_bit(trainable):
    # weight decay and momentum touch everything they see; the frozen half is never shown to them
    optimizer = make_optimizer(OptimizerSettings(0.1, steps=9, weight_decay=0.5))
    params = make_params()
    state = init_train_state(params, optimizer, trainable)
    for _ in range(3):
        trained, _ = split_params(state.params, trainable)
        gradients = {path: jnp.ones_like(leaf) for path, leaf in trained.items()}
        state, _ = apply_gradients(state, gradients, optimizer, trainable)
    before, after = (dict(split_params(p, "all")[0]) for p in (params, state.params))
    for path in before:
        same = bool((before[path] == after[path]).all())
        assert same == (path not in TRAINED[trainable]), path
    assert state.step == 3


def test_the_optimizer_keeps_state_for_the_trained_half_only():
    optimizer = make_optimizer(OptimizerSettings(0.1, steps=9))
    params = make_params()
    sizes = {
        trainable: sum(
            leaf.size
            for leaf in jax.tree.leaves(init_train_state(params, optimizer, trainable).opt_state)
        )
        for trainable in ("lora", "all")
    }
    adapters = 2 * 3 * 2 + 2 * 2 * 4  # lora_a and lora_b
    whole = adapters + 9 + 15 + 24  # and patch, embedding, kernel
    assert sizes["all"] - sizes["lora"] == 2 * (whole - adapters)  # two moments each


def learning_rates(settings, count):
    """Sizes of the first updates: Adam with equal gradients moves by the rate itself."""
    optimizer = make_optimizer(settings)
    params = {"w": jnp.zeros(())}
    state, rates = optimizer.init(params), []
    for _ in range(count):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    return rates


def test_the_warm_up_rises_in_equal_steps_from_the_first_update():
    rates = learning_rates(OptimizerSettings(0.4, steps=10, warmup_steps=4), 7)
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4], rtol=1e-4)


def test_cosine_falls_to_a_tenth():
    rates = learning_rates(OptimizerSettings(1.0, steps=5, warmup_steps=1, schedule="cosine"), 6)
    # after the warm-up of 1: 0.1 + 0.9 (1 + cos(pi i / 4)) / 2, i = 0 ... 4
    cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * i / 4)) for i in range(5)]
    np.testing.assert_allclose(rates, [1.0, *cosine], rtol=1e-3)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rates(OptimizerSettings(0.3, steps=3), 1) == pytest.approx([0.3], rel=1e-4)


def test_a_warm_up_longer_than_the_run_is_cut_to_it():
    # 2 updates in all: a warm-up of 1 and a peak of 1
    rates = learning_rates(OptimizerSettings(0.3, steps=2, warmup_steps=50), 2)
    np.testing.assert_allclose(rates, [0.3, 0.3], rtol=1e-4)


def test_the_gradient_norm_is_told_before_clipping_and_clipped():
    settings = OptimizerSettings(1.0, steps=2, clip_norm=1.0)
    optimizer = make_optimizer(settings)
    state = init_train_state({"w": {"kernel": jnp.zeros(2)}}, optimizer, "all")
    state, norm = apply_gradients(
        state, {("w", "kernel"): jnp.array([30.0, 40.0])}, optimizer, "all"
    )
    assert norm == 50
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")["w"]["kernel"]
    # clipped to (0.6, 0.8), times 1 - b1 = 0.1
    np.testing.assert_allclose(moment, [0.06, 0.08], rtol=1e-5)


def test_weight_decay_is_for_matrices_only():
    optimizer = make_optimizer(OptimizerSettings(0.1, steps=2, weight_decay=0.5))
    params = {"layers": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    state = init_train_state(params, optimizer, "all")
    gradients = {("layers", name): jnp.zeros_like(leaf) for name, leaf in params["layers"].items()}
    state, _ = apply_gradients(state, gradients, optimizer, "all")
    np.testing.assert_allclose(state.params["layers"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    assert (state.params["layers"]["bias"] == 1).all()


def test_moments_in_half_the_bytes_follow_the_wide_ones():
    rng = np.random.default_rng(0)
    params = {"w": {"kernel": jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)}}
    optimizers = {
        dtype: make_optimizer(OptimizerSettings(0.01, steps=9, moment_dtype=dtype))
        for dtype in ("float32", "bfloat16")
    }
    states = {name: init_train_state(params, o, "all") for name, o in optimizers.items()}
    for _ in range(5):
        gradients = {("w", "kernel"): jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)}
        for name, optimizer in optimizers.items():
            states[name], _ = apply_gradients(states[name], gradients, optimizer, "all")
    wide, half = (states[name].params["w"]["kernel"] for name in optimizers)
    assert float(jnp.abs(wide - params["w"]["kernel"]).mean()) > 0.005
    np.testing.assert_allclose(half, wide, atol=3e-4)  # of steps of 0.01 each
    moments = [x for x in jax.tree.leaves(states["bfloat16"].opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("bfloat16")} and len(moments) == 2
    assert half.dtype == jnp.float32


def test_half_precision_gradients_are_added_in_float32():
    # 256 + 1 is 256 in bfloat16: eight parts of 1 would be lost
    values = jnp.asarray([[256.0], *[[1.0]] * 8], jnp.bfloat16)

    def loss_of(trained, micro):
        loss = jnp.sum(trained[("w",)] * micro[0])
        return loss, {"train/loss": loss.astype(jnp.float32)}

    trained = {("w",): jnp.ones((), jnp.bfloat16)}
    gradients, _ = accumulate_gradients(loss_of, trained, split_micro_batches((values,), 9))
    assert gradients[("w",)].dtype == jnp.float32 and gradients[("w",)] == 264


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moment_dtype": "bfloat16", "b2": 0.999}, "never shrinks"),
        ({"moment_dtype": "float16"}, "must be one of"),
    ],
)
def test_moment_dtypes_that_would_not_train_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(0.1, steps=1, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.0}, {"steps": 0}, {"warmup_steps": -1}, {"schedule": "linear"}],
)
def test_senseless_optimizer_settings_are_errors(changes):
    with pytest.raises(ValueError, match=r"learning_rate > 0|schedule must be"):
        OptimizerSettings(**({"learning_rate": 0.1, "steps": 1} | changes))


def test_micro_batches_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    inputs, targets = (jnp.asarray(rng.standard_normal((8, n)), jnp.float32) for n in (3, 1))
    trained = {("w",): jnp.asarray(rng.standard_normal((3, 1)), jnp.float32)}

    def loss_of(trained, micro):
        x, y = micro
        loss = jnp.sum(jnp.square(x @ trained[("w",)] - y)) / 8
        return loss, {"train/loss": loss}

    whole = accumulate_gradients(loss_of, trained, split_micro_batches((inputs, targets), 1))
    expected = jax.grad(lambda t: loss_of(t, (inputs, targets))[0])(trained)
    np.testing.assert_allclose(whole[0][("w",)], expected[("w",)], rtol=1e-6)
    for count in (2, 4, 8):
        parts = split_micro_batches((inputs, targets), count)
        gradients, metrics = accumulate_gradients(loss_of, trained, parts)
        np.testing.assert_allclose(gradients[("w",)], expected[("w",)], rtol=1e-5)
        np.testing.assert_allclose(metrics["train/loss"], whole[1]["train/loss"], rtol=1e-5)


def test_rows_that_do_not_split_are_an_error():
    with pytest.raises(ValueError, match="7 rows do not split into 2 micro-batches"):
        split_micro_batches({"x": jnp.zeros((7, 2))}, 2)


def test_micro_batches_0_are_one_row_a_device():
    rows = jnp.arange(8)
    assert split_micro_batches(rows, 0).tolist() == [[row] for row in range(8)]
    with jax.set_mesh(make_mesh(1, 4, 1, devices=jax.devices()[:4])):
        parts = split_micro_batches(rows, 0)  # a device has neighbours: (0 1) (2 3) (4 5) (6 7)
    assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ValueError, match="must be 0"):
        split_micro_batches(rows, -1)
