"""Groups on the host: laid out for training, and kept in a checkpoint without a change."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_model import load_tiny_processor, make_question
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.rollouts.sampled import (
    Group,
    behavior_of,
    deal_groups,
    decode_groups,
    encode_groups,
    make_group_batch,
)

SIZES = PromptSizes((64, 96), (1,))
PROCESSOR = load_tiny_processor()


def make_group(number=0, longest=4, behavior=None, rewards=(0.0, 1.0, 1.0)):
    rng = np.random.default_rng(number)
    lengths = np.array([2, 1, longest], np.int32)
    said = np.arange(8) < lengths[:, None]
    return Group(
        make_question(number, meta={"depth": 2}),
        np.where(said, rng.integers(100, 200, (3, 8)), 0).astype(np.int32),
        lengths,
        np.array([True, True, False]),
        np.where(said, -rng.random((3, 8)), 0).astype(np.float32),
        np.array(rewards, np.float32),
        behavior,
    )


def batch_of(groups, num_groups=3, buckets=(4, 8)):
    return make_group_batch(groups, PROCESSOR, SIZES, buckets, num_groups)


def test_groups_become_rows_and_missing_ones_are_not_valid():
    groups = [make_group(0), make_group(1)]
    batch = batch_of(groups)
    assert batch.prompts.valid.tolist() == [True, True, False]
    assert batch.completions.shape == (3, 3, 4)  # the smallest bucket that holds the longest
    for i, group in enumerate(groups):
        np.testing.assert_array_equal(batch.completions[i], group.tokens[:, :4])
        np.testing.assert_array_equal(batch.lengths[i], group.lengths)
        np.testing.assert_array_equal(batch.rewards[i], group.rewards)
    assert not batch.lengths[2].any()


def test_no_word_of_the_policy_is_in_a_row_that_is_trained_on():
    group = make_group(0)
    text = PROCESSOR.tokenizer.decode(batch_of([group]).prompts.tokens[0])
    assert group.example.query in text
    assert not [line for line in group.example.policy_text.splitlines() if line in text]


def test_a_longer_completion_takes_the_next_bucket():
    assert batch_of([make_group(0, longest=5)]).completions.shape[-1] == 8
    with pytest.raises(ValueError, match="more than the largest bucket"):
        batch_of([make_group(0, longest=5)], buckets=(4,))


def test_a_completion_with_an_image_token_is_refused():
    group = make_group(0)
    group.tokens[2, 3] = PROCESSOR.image_token_id
    with pytest.raises(ValueError, match="a completion of q0 holds an image token"):
        batch_of([group])
    group.tokens[2, 3], group.tokens[2, 7] = 100, PROCESSOR.image_token_id  # after the end: junk
    batch_of([group])


def test_groups_survive_a_checkpoint_bit_by_bit():
    behavior = np.full((3, 4), -0.5, np.float32)
    groups = [make_group(0), make_group(1, behavior=behavior)]
    found = decode_groups(json.loads(json.dumps(encode_groups(groups))))
    for one, other in zip(found, groups, strict=True):
        assert one.example == other.example
        for name in ("tokens", "lengths", "stopped", "sampled_logprobs", "rewards"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert found[0].behavior_logprobs is None
    np.testing.assert_array_equal(found[1].behavior_logprobs, behavior)


def test_kept_behavior_fits_a_longer_or_shorter_batch():
    group = make_group(0, behavior=np.full((3, 4), -0.5, np.float32))
    assert (behavior_of([group], (2, 3, 8))[0, :, :4] == -0.5).all()
    assert not behavior_of([group], (2, 3, 8))[0, :, 4:].any()
    assert behavior_of([group, make_group(1)], (2, 3, 2)).shape == (2, 3, 2)


def test_only_a_spread_of_rewards_teaches():
    assert make_group(0).has_spread
    assert not make_group(0, rewards=(0.1, 0.1, 0.1)).has_spread


def test_groups_move_only_from_a_share_without_room_by_hand():
    assert deal_groups([0, 0, 0, 1], 2, 2) == [0, 0, 1, 1]
    assert deal_groups([0, 1, 0, 1], 2, 2) == [0, 1, 0, 1]
    assert deal_groups([2, 2, 2], 3, 1) == [2, 0, 1]
    assert deal_groups([1, 1], 4, 2) == [1, 1]  # fewer groups than room: nothing moves
    assert deal_groups([], 2, 2) == []


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(3, 5))
def test_every_share_gets_at_most_its_room(owners, room):
    dealt = deal_groups(owners, 4, room)
    counts = np.bincount(dealt, minlength=4)
    assert counts.max(initial=0) <= room
    moved = sum(one != other for one, other in zip(owners, dealt, strict=True))
    assert moved == np.maximum(np.bincount(owners, minlength=4) - room, 0).sum()
