"""Buckets: the smallest that fits, nothing cut, what is too long is counted, padding is marked."""

import jax
import numpy as np
import pytest

from tests.tiny_model import load_tiny_processor, make_png, make_question
from trimpi_jax.inputs.batching import choose_bucket, drop_too_long, make_batch, padding_waste
from trimpi_jax.stages.sft import encode_sft_row


@pytest.fixture(scope="module")
def rows():
    """Three rows of different lengths; the last one has a picture of two windows."""
    questions = [
        make_question(0, query="a"),
        make_question(1, query="a longer question, by some words"),
        make_question(2, query="wide", images=(make_png(2, 56, 112),)),
    ]
    processor = load_tiny_processor()
    return [encode_sft_row(question, processor, stage="direct_sft") for question in questions]


@pytest.mark.parametrize(("size", "bucket"), [(0, 4), (4, 4), (5, 8), (8, 8), (9, 20), (20, 20)])
def test_the_smallest_bucket_that_holds_the_size(size, bucket):
    assert choose_bucket(size, (20, 4, 8)) == bucket


def test_what_no_bucket_holds_is_an_error():
    with pytest.raises(ValueError, match=r"21 is more than the largest bucket of \[4, 8, 20\]"):
        choose_bucket(21, (20, 4, 8))


def test_too_long_rows_are_dropped_whole_and_counted(rows):
    short, long, wide = (len(row.tokens) for row in rows)
    assert short < long
    fitted = drop_too_long(rows, max_tokens=short, max_windows=9)
    assert (fitted.kept, fitted.too_long, fitted.longest) == ([0], 2, max(long, wide))
    assert fitted.rows[0] is rows[0]
    fitted = drop_too_long(rows, max_tokens=1000, max_windows=1)
    assert (fitted.kept, fitted.too_long) == ([0, 1], 1)  # too many windows is too long, too
    fitted = drop_too_long(rows, max_tokens=max(long, wide), max_windows=2)
    assert (fitted.kept, fitted.too_long) == ([0, 1, 2], 0)
    assert drop_too_long([], 5, 5) == ([], [], 0, 0)


def test_a_batch_holds_every_row_unchanged_and_zeros_after_it(rows):
    batch = make_batch(rows, num_rows=4, num_tokens=96, num_windows=3)
    for i, row in enumerate(rows):
        length, windows = len(row.tokens), len(row.images.patches)
        assert batch.lengths[i] == length
        np.testing.assert_array_equal(batch.tokens[i, :length], row.tokens)
        np.testing.assert_array_equal(batch.positions[i, :, :length], row.positions)
        np.testing.assert_array_equal(batch.loss_mask[i, :length], row.loss_mask)
        np.testing.assert_array_equal(batch.visual_index[i, :length], row.visual_index)
        np.testing.assert_array_equal(batch.patches[i, :windows], row.images.patches)
        np.testing.assert_array_equal(batch.patch_hw[i, :windows], row.images.patch_hw)
        np.testing.assert_array_equal(batch.patch_segment[i, :windows], row.images.patch_segment)
        assert batch.rope_delta[i] == row.rope_delta
        assert not batch.tokens[i, length:].any()
        assert not batch.loss_mask[i, length:].any()
        assert (batch.visual_index[i, length:] == -1).all()
        assert not batch.patch_segment[i, windows:].any()


def test_padding_rows_are_marked_and_count_for_nothing(rows):
    batch = make_batch(rows[:1], num_rows=3, num_tokens=80, num_windows=1)
    assert batch.valid.tolist() == [True, False, False]
    assert batch.lengths[1:].tolist() == [1, 1]  # so that no attention row is empty
    assert not batch.loss_mask[1:].any()
    assert not batch.patch_segment[1:].any()


def test_every_leaf_leads_with_the_rows(rows):
    batch = make_batch(rows, num_rows=5, num_tokens=96, num_windows=2)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {5}


@pytest.mark.parametrize("shape", [(2, 96, 2), (3, 20, 2), (3, 96, 1)])
def test_what_does_not_fit_the_shape_is_an_error_not_a_cut(rows, shape):
    num_rows, num_tokens, num_windows = shape
    with pytest.raises(ValueError, match=rf"do not fit a batch of {num_rows} rows, {num_tokens}"):
        make_batch(rows, num_rows=num_rows, num_tokens=num_tokens, num_windows=num_windows)


def test_padding_waste_by_hand(rows):
    batch = make_batch(rows[:2], num_rows=4, num_tokens=100, num_windows=1)
    used = len(rows[0].tokens) + len(rows[1].tokens)
    assert padding_waste(batch) == pytest.approx(1 - used / 400)
