"""Packed rows: nothing lost, nothing seen across a seam, the loss of the plain rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_model import (
    load_tiny_processor,
    make_png,
    make_question,
    tiny_config,
    tiny_params,
)
from trimpi_jax.inputs.batching import BatchShapes, fill_batch, make_batch, padding_waste
from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.inputs.sequence_packing import pack_rows, row_counts
from trimpi_jax.models import vlm
from trimpi_jax.models.packing import PackedImages
from trimpi_jax.objectives.cross_entropy import masked_nll_sum
from trimpi_jax.stages.sft import encode_sft_row
from trimpi_jax.stages.supervised import StepSettings, row_logprobs


@pytest.fixture(scope="module")
def rows():
    questions = [
        make_question(0, query="a"),
        make_question(1, query="a longer question, by some words"),
        make_question(2, query="wide", images=(make_png(2, 56, 112), make_png(3, 28, 28))),
        make_question(3, query="no picture", images=()),
    ]
    processor = load_tiny_processor()
    return [encode_sft_row(question, processor, stage="direct_sft") for question in questions]


def bare_row(length, first=7):
    """A row without images whose tokens say who they are."""
    images = PackedImages(
        np.zeros((0, 4, 12), np.uint8),
        np.zeros((0, 4, 2), np.int32),
        np.zeros((0, 4), np.int32),
        [],
        [],
    )
    tokens = np.arange(first, first + length, dtype=np.int32)
    mask = np.arange(length) > 0
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    return EncodedRow(tokens, mask, positions, 0, np.full(length, -1, np.int32), images)


def test_packing_by_hand():
    # 5, 4, 3, 3, 2 tokens into rows of 8: (5, 3), (4, 3), (2) by first fit, longest first
    packed = pack_rows([bare_row(n, 10 * n) for n in (3, 5, 2, 4, 3)], 8, 0)
    assert [row.segments.tolist() for row in packed] == [
        [1] * 5 + [2] * 3,
        [1] * 4 + [2] * 3,
        [1] * 2,
    ]
    assert packed[0].tokens.tolist() == [50, 51, 52, 53, 54, 30, 31, 32]
    assert packed[0].positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed[0].loss_mask.tolist() == [False, *[True] * 4, False, True, True]
    batch = make_batch(packed, num_rows=4, num_tokens=8, num_windows=0)
    assert batch.segments.tolist()[2:] == [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert padding_waste(batch) == pytest.approx(1 - 17 / 32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=12), st.integers(20, 40))
def test_every_row_is_in_exactly_one_packed_row(lengths, max_tokens):
    packed = pack_rows([bare_row(n, 100 * i) for i, n in enumerate(lengths)], max_tokens, 0)
    assert all(len(row.tokens) <= max_tokens for row in packed)
    pieces = [
        row.tokens[row.segments == s] for row in packed for s in range(1, row.segments.max() + 1)
    ]
    found = {int(piece[0]) // 100: len(piece) for piece in pieces}
    assert found == dict(enumerate(lengths))
    fewest = -(-sum(lengths) // max_tokens)
    assert len(packed) <= 11 / 9 * max(fewest, 1) + sum(n > max_tokens / 2 for n in lengths) + 1


def test_a_row_that_is_larger_than_a_packed_row_is_an_error(rows):
    with pytest.raises(ValueError, match="a row of 9 tokens and 0 windows does not fit"):
        pack_rows([bare_row(9)], 8, 0)
    with pytest.raises(ValueError, match=r"does not fit packed rows of 999 tokens and 1 windows"):
        pack_rows(rows, 999, 1)


def test_vision_windows_are_room_too(rows):
    windows = [len(row.images.patches) for row in rows]
    packed = pack_rows(rows, 4096, max(windows))
    assert len(packed) > 1
    assert all(len(row.images.patches) <= max(windows) for row in packed)
    assert sum(len(row.images.patches) for row in packed) == sum(windows)


def test_nothing_gives_nothing():
    assert pack_rows([], 8, 8) == []


@pytest.mark.parametrize(
    ("most", "multiple", "counts"),
    [
        (16, 1, (1, 2, 4, 8, 16)),
        (16, 4, (4, 8, 16)),
        (12, 1, (3, 6, 12)),
        (12, 4, (12,)),
        (5, 1, (5,)),
    ],
)
def test_few_row_counts(most, multiple, counts):
    assert row_counts(most, multiple) == counts


def test_a_filled_batch_has_one_of_the_announced_shapes(rows):
    tokens = max(len(row.tokens) for row in rows)
    windows = max(len(row.images.patches) for row in rows)
    plain = BatchShapes(8, (tokens // 2, tokens), (1, windows))
    packed = BatchShapes(8, (tokens,), (windows,), 2 * tokens, 2 * windows)
    assert packed.every() == [(n, 2 * tokens, 2 * windows) for n in (1, 2, 4, 8)]
    for shapes in (plain, packed):
        for part in (rows, rows[:2], rows[3:]):
            batch = fill_batch(part, shapes)
            assert (*batch.tokens.shape, batch.patches.shape[1]) in shapes.every()
    assert fill_batch(rows, packed).tokens.shape[0] == 2
    assert padding_waste(fill_batch(rows, packed)) < padding_waste(fill_batch(rows, plain))


def test_shapes_that_cannot_hold_every_row_are_refused():
    with pytest.raises(ValueError, match=r"pack_tokens must be at least 90 .*at least 6"):
        BatchShapes(8, (50, 90), (6,), 60, 6)
    with pytest.raises(ValueError, match="pack_windows has no effect without pack_tokens"):
        BatchShapes(8, (50, 90), (6,), 0, 6)


def test_the_loss_and_its_gradient_are_those_of_the_plain_rows(rows):
    config = tiny_config()
    params = jax.tree.map(jnp.asarray, tiny_params(config))
    sizes = {"token_buckets": (128,), "window_buckets": (4,)}
    plain = fill_batch(rows, BatchShapes(4, **sizes))
    packed = fill_batch(rows, BatchShapes(4, **sizes, pack_tokens=256, pack_windows=8))
    assert packed.tokens.shape[0] < plain.tokens.shape[0]

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        visual = vlm.encode_images(
            params, config, batch.patches, batch.patch_hw, batch.patch_segment
        )
        logprobs, _ = row_logprobs(params, config, batch, visual, StepSettings("all"))
        return masked_nll_sum(logprobs, batch.loss_mask[:, 1:])

    (one, one_gradient), (two, two_gradient) = (
        loss(params, jax.tree.map(jnp.asarray, batch)) for batch in (plain, packed)
    )
    np.testing.assert_allclose(one, two, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3),
        one_gradient,
        two_gradient,
    )
    seams = packed.replace(segments=(packed.segments > 0).astype(np.int32))
    unseparated, _ = loss(params, jax.tree.map(jnp.asarray, seams))
    assert abs(float(unseparated) - float(one)) > 1e-3


def test_images_go_with_their_rows(rows):
    (packed,) = pack_rows(rows, 4096, 99)
    order = sorted(rows, key=lambda row: -len(row.tokens))
    visual = packed.images.patches.reshape(-1, *packed.images.patches.shape[2:])
    segments = packed.images.patch_segment.reshape(-1)
    assert len(packed.images.grids) == sum(len(row.images.grids) for row in rows)
    assert set(segments[segments > 0]) == set(range(1, len(packed.images.grids) + 1))
    for number, row in enumerate(order, 1):
        here = packed.segments == number
        np.testing.assert_array_equal(packed.tokens[here], row.tokens)
        np.testing.assert_array_equal(packed.positions[:, here], row.positions)
        np.testing.assert_array_equal(packed.loss_mask[here], row.loss_mask)
        shown = packed.visual_index[here]
        np.testing.assert_array_equal(shown >= 0, row.visual_index >= 0)
        own = row.images.patches.reshape(-1, visual.shape[-1])
        for new, old in zip(
            shown[shown >= 0], row.visual_index[row.visual_index >= 0], strict=True
        ):
            np.testing.assert_array_equal(visual[4 * new : 4 * new + 4], own[4 * old : 4 * old + 4])
