"""What must not change the answer: layer loop, padding, company, order, sharing, caching."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.rows import make_batch, make_row, random_params, tiny_config
from trimpi_jax.models import vision, vlm
from trimpi_jax.models.language import DecodeContext
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.ops.branches import Shared, share
from trimpi_jax.sharding import LOGICAL_RULES

APPLY = jax.jit(vlm.apply, static_argnums=1)


def close(a, b, atol=2e-6):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def test_axes_and_shapes_agree(config):
    for each in (config, dataclasses.replace(tiny_config(tied=False))):
        axes, shapes = vlm.logical_axes(each), vlm.param_shapes(each)
        is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
        pairs = jax.tree.map(lambda a, s: (a, s.shape), axes, shapes, is_leaf=is_names)
        for names, shape in jax.tree.leaves(pairs, is_leaf=is_names):
            assert len(names) == len(shape)
            assert set(names) <= LOGICAL_RULES.keys()
        assert ("head" in shapes["language"]) == (not each.text.tied)


def test_initial_weights(config):
    @jax.jit  # of all the weights, only those returned are computed
    def some(key):
        layers = vlm.init_params(config, key)["language"]["layers"]
        return layers["gate"]["kernel"], layers["q"]["bias"], layers["input_norm"]["scale"]

    kernel, bias, scale = map(np.asarray, some(jax.random.key(0)))
    assert kernel.shape == (2, 64, 96) and kernel.dtype == np.float32
    assert abs(kernel.std() - config.text.init_std) < 1e-3
    assert np.abs(kernel[0] - kernel[1]).max() > 0  # layers differ
    np.testing.assert_array_equal(bias, 0.0)
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_array_equal(some(jax.random.key(0))[0], kernel)
    assert np.abs(np.asarray(some(jax.random.key(1))[0]) - kernel).max() > 0


def test_unrolled_is_scanned(config, params, batch, logits):
    unrolled = dataclasses.replace(config, layer_loop="unrolled")
    close(APPLY(params, unrolled, batch), logits)


def test_grouped_scan_is_any_pattern(batch, monkeypatch):
    config = tiny_config(depth=6)
    params = random_params(config, spread=0.05)
    encode = lambda: jax.jit(vlm.encode_images, static_argnums=1)(  # noqa: E731
        params, config, batch.patches, batch.patch_hw, batch.patch_segment
    )
    assert vision.group_size(config.vision) == 2
    grouped = encode()
    monkeypatch.setattr(vision, "group_size", lambda _: 0)
    jax.clear_caches()
    close(grouped, encode(), atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "full", "size"),
    [(32, (7, 15, 23, 31), 8), (4, (1, 3), 2), (2, (0, 1), 1), (4, (1, 2), 0), (3, (1,), 0)],
)
def test_group_size(depth, full, size):
    config = dataclasses.replace(tiny_config().vision, depth=depth, full_attention_blocks=full)
    assert vision.group_size(config) == size


def test_padding_changes_nothing(config, params, rows, logits):
    for i in (0, 2):
        alone = make_batch([rows[i]], config)  # no padding at all; text only has W = 0
        close(APPLY(params, config, alone)[0], logits[i, : rows[i].tokens.size])


def test_padded_positions_have_zero_hidden(config, params, batch):
    visual = jnp.zeros((4, batch.patches.shape[1] * 16, 64))
    hidden = jax.jit(vlm.hidden_states, static_argnums=1)(
        params, config, batch.tokens, batch.positions, batch.lengths, visual, batch.visual_index
    )
    for row, length in zip(np.asarray(hidden), batch.lengths, strict=True):
        assert not row[length:].any() and row[:length].any(axis=-1).all()


def test_company_and_content_of_padding_change_nothing(config, params, rows, batch, logits):
    order = [2, 0, 3, 1]
    shuffled = jax.tree.map(lambda a: a[np.array(order)], batch)
    close(APPLY(params, config, shuffled), logits[order])
    rng = np.random.default_rng(0)
    real = np.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
    empty = (batch.patch_segment == 0)[..., None]
    noisy = batch.replace(
        tokens=np.where(real, batch.tokens, rng.integers(0, 300, batch.tokens.shape)),
        patches=np.where(empty, rng.integers(0, 256, batch.patches.shape), batch.patches).astype(
            np.uint8
        ),
    )
    close(np.asarray(APPLY(params, config, noisy))[real], logits[real])


def test_images_of_a_row_do_not_see_each_other(config, params, rows, batch):
    encode = jax.jit(vlm.encode_images, static_argnums=1)
    first = encode(params, config, batch.patches, batch.patch_hw, batch.patch_segment)
    changed = np.where((batch.patch_segment == 2)[..., None], 255 - batch.patches, batch.patches)
    second = encode(params, config, changed, batch.patch_hw, batch.patch_segment)
    cells = batch.patch_segment.reshape(len(rows), -1, 4)[..., 0]
    np.testing.assert_array_equal(np.asarray(first)[cells == 1], np.asarray(second)[cells == 1])
    assert np.abs(np.asarray(first - second))[cells == 2].max() > 1e-2


def test_token_logprobs_are_those_of_the_logits(config, params, batch, logits):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 320, (2, 5)))
    logprobs, entropy = vlm.token_logprobs(params, config, hidden, targets, chunk=3)
    table = jax.nn.log_softmax(vlm.logits(params, config, hidden))
    close(logprobs, jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0], 5e-6)
    close(entropy, -jnp.sum(jnp.exp(table) * table, axis=-1), 5e-6)


def test_decoding_is_prefill_and_sharing_is_copying(config, params, rows, batch, logits):
    """The last `steps` tokens of a row, decoded one by one, get the logits of the whole row."""
    steps = 3
    prompt_lengths = batch.lengths - steps
    cut = batch.replace(lengths=prompt_lengths)

    @jax.jit
    def decode(params, cut, tokens):
        visual = vlm.encode_images(params, config, cut.patches, cut.patch_hw, cut.patch_segment)
        last, prompt_kv = vlm.prefill(
            params, config, cut.tokens, cut.positions, cut.lengths, visual, cut.visual_index
        )
        weights = vlm.decode_weights(params, jnp.float32)
        context = DecodeContext([share(kv) for kv in prompt_kv], cut.lengths)
        shape = (*tokens.shape[:2], config.text.kv_heads, steps, config.text.head_width)
        junk = jnp.full(shape, 7.0)  # never read
        cache = [Shared(junk, junk) for _ in prompt_kv]
        out = [vlm.logits(params, config, last)]
        for step in range(steps):
            start = (cut.lengths + cut.rope_delta)[:, None] + step
            positions = jnp.broadcast_to(start, tokens.shape[:2])
            hidden, cache = vlm.decode_step(
                weights, config, tokens[..., step], positions, context, cache, step
            )
            out.append(vlm.logits(params, config, hidden))
        return out

    index = prompt_lengths[:, None] + np.arange(steps)
    told = np.take_along_axis(batch.tokens, index, axis=1)
    other = np.full_like(told, 5)
    group = np.stack([told, other], axis=1)  # [Q, G, steps]
    out = decode(params, cut, group)
    for i, row in enumerate(rows):
        at = row.tokens.size - steps - 1
        close(out[0][i], logits[i, at])
        for step in range(steps):
            close(out[step + 1][i, 0], logits[i, at + 1 + step], 5e-6)
    for g in range(2):  # alone, each completion gets what it got in the group
        alone = decode(params, cut, group[:, g : g + 1])
        for step in range(steps):
            close(alone[step + 1][:, 0], out[step + 1][:, g])


def test_decode_keeps_the_dtype_of_its_cache(config, params):
    weights = jax.jit(lambda tree: vlm.decode_weights(tree, jnp.bfloat16))(params)
    heads, width = config.text.kv_heads, config.text.head_width
    empty = jnp.zeros((1, 2, heads, 4, width), jnp.bfloat16)
    prompt = jnp.zeros((1, heads, 3, width), jnp.bfloat16)
    hidden, cache = jax.jit(vlm.decode_step, static_argnums=1)(
        weights,
        config,
        jnp.array([[5, 6]]),
        jnp.array([[3, 3]]),
        DecodeContext([Shared(prompt, prompt)] * 2, jnp.array([3])),
        [Shared(empty, empty)] * 2,
        jnp.asarray(0),
    )
    assert hidden.dtype == jnp.bfloat16 and cache[0].k.dtype == jnp.bfloat16
    written = np.asarray(cache[1].v)
    assert written[:, :, :, 0].any() and not written[:, :, :, 1:].any()


def _hidden_sum(params, config, batch, remat):
    visual = vlm.encode_images(
        params, config, batch.patches, batch.patch_hw, batch.patch_segment, remat=remat
    )
    arrays = (batch.tokens, batch.positions, batch.lengths, visual, batch.visual_index)
    return jnp.sum(jnp.sin(vlm.hidden_states(params, config, *arrays, remat=remat)))


GRADIENT = jax.jit(jax.grad(_hidden_sum), static_argnums=(1, 3))


@pytest.mark.parametrize(
    ("attention", "remat"), [("splash_interpret", "attention"), ("xla", "dots")]
)
def test_kernels_and_recomputation_change_no_gradient(config, params, attention, remat):
    batch = make_batch([make_row("aligned")], config)
    reference = GRADIENT(params, config, batch, "none")
    chosen = dataclasses.replace(config, attention=attention)
    scale = jax.tree.map(lambda leaf: np.abs(leaf).max() + 1e-3, reference)
    jax.tree.map(
        lambda a, b, s: np.testing.assert_allclose(a / s, b / s, atol=3e-5),
        GRADIENT(params, chosen, batch, remat),
        reference,
        scale,
    )


def test_casting_the_weights_first_gives_the_same_numbers(config, params, batch):
    run = jax.jit(lambda p: vlm.apply(p, config, batch, dtype=jnp.bfloat16))
    cast = cast_weights(params, jnp.bfloat16)
    kernel = cast["language"]["layers"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(run(cast), run(params))
