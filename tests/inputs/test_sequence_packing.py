"""Packed rows: nothing lost, nothing seen across a seam, the loss of the plain rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_model import load_tiny_processor, make_png, make_question
from trimpi_jax.inputs.batching import make_batch, padding_waste
from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.inputs.sequence_packing import choose_row_count, pack_rows
from trimpi_jax.models.packing import PackedImages
from trimpi_jax.stages.sft import encode_sft_row


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
    packed = pack_rows([bare_row(n, 10 * n) for n in (3, 5, 2, 4, 3)], 8)
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
    packed = pack_rows([bare_row(n, 100 * i) for i, n in enumerate(lengths)], max_tokens)
    assert all(len(row.tokens) <= max_tokens for row in packed)
    pieces = [
        row.tokens[row.segments == s] for row in packed for s in range(1, row.segments.max() + 1)
    ]
    found = {int(piece[0]) // 100: len(piece) for piece in pieces}
    assert found == dict(enumerate(lengths))
    fewest = -(-sum(lengths) // max_tokens)
    assert len(packed) <= 11 / 9 * max(fewest, 1) + sum(n > max_tokens / 2 for n in lengths) + 1


def test_a_row_that_is_longer_than_a_packed_row_is_an_error():
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit packed rows of 8"):
        pack_rows([bare_row(9)], 8)


def test_nothing_gives_nothing():
    assert pack_rows([], 8) == []


@pytest.mark.parametrize(
    ("needed", "most", "multiple", "count"),
    [(3, 16, 1, 4), (4, 16, 1, 4), (5, 16, 1, 8), (9, 16, 1, 16), (1, 12, 4, 12), (1, 24, 4, 12)],
)
def test_few_row_counts(needed, most, multiple, count):
    assert choose_row_count(needed, most, multiple) == count


def test_more_packed_rows_than_the_batch_holds_are_an_error():
    with pytest.raises(ValueError, match="17 packed rows do not fit a batch of 16"):
        choose_row_count(17, 16, 1)


def test_images_go_with_their_rows(rows):
    (packed,) = pack_rows(rows, 4096)
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
