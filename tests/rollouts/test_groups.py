"""Two views of each prompt, and how prompts stand behind shared policies."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_model import load_tiny_processor, make_question, tiny_config
from trimpi_jax.rollouts.engine import (
    encode_questions,
    make_aware_view,
    make_engine,
    make_free_view,
)
from trimpi_jax.rollouts.groups import MAX_EMPTY_SHARE, PromptSizes, plan_chunks
from trimpi_jax.sharding import make_mesh

QUESTIONS = [make_question(0), make_question(1, query="Which case, please?")]


@pytest.fixture(scope="module")
def engine():
    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = PromptSizes((64, 224), (2,))
    return make_engine(tiny_config(), load_tiny_processor(), sizes, mesh, dtype="float32")


def test_the_views_differ_by_the_policy_alone(engine):
    asked = encode_questions(engine, QUESTIONS, aware=True, share=False)
    decode = engine.processor.tokenizer.decode
    for question, short, long in zip(QUESTIONS, asked.free, asked.aware, strict=True):
        texts = [decode(row.tokens) for row in (short, long)]
        user = [text[text.index("<|im_start|>user") :] for text in texts]
        assert user[0] == user[1]
        assert question.policy_text in texts[1]
        assert "# Condition" not in texts[0]


def test_a_view_takes_the_smallest_bucket_that_holds_all(engine):
    asked = encode_questions(engine, QUESTIONS, aware=True, share=False)
    assert make_free_view(engine, asked, 2).batch.tokens.shape == (2, 64)
    assert make_aware_view(engine, asked, 2, 1).batch.tokens.shape == (2, 224)
    padded = make_free_view(engine, asked, 4).batch
    assert padded.valid.tolist() == [True, True, False, False]


def test_behind_a_shared_policy_stands_the_question_alone(engine):
    asked = encode_questions(engine, QUESTIONS, aware=True)
    view = make_aware_view(engine, asked, 4, 4)
    assert view.batch.tokens.shape == (4, 64)
    assert view.batch.patches.shape[1] == 0
    assert view.policy_of.tolist() == [0]
    decode = engine.processor.tokenizer.decode
    assert "# Condition" not in decode(asked.aware[0].tokens)
    assert QUESTIONS[0].policy_text in decode(view.policies[0].row.tokens)


@pytest.mark.parametrize(
    ("owners", "max_chunk", "rows", "policies", "size"),
    [
        # A B A A B A: chunks of 2, none empty
        ([0, 1, 0, 0, 1, 0], 2, [0, 4, 1, 2, 5, 3], [0, 0, 1], 2),
        # one policy: one chunk
        ([0, 0, 0, 0], 8, [0, 1, 2, 3], [0], 4),
        # A A A B: chunks of 2 would leave 2 of 6 rows empty, more than a quarter of 4
        ([0, 0, 0, 1], 4, [0, 1, 2, 3], [0, 0, 0, 1], 1),
        ([1, 0], 1, [1, 0], [0, 1], 1),
    ],
)
def test_chunks_by_hand(owners, max_chunk, rows, policies, size):
    chunks = plan_chunks(owners, max_chunk)
    assert chunks.row_of.tolist() == rows
    assert chunks.policy_of.tolist() == policies
    assert chunks.size == size


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=24),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([1, 2, 4]),
)
def test_every_prompt_stands_alone_behind_its_own_policy(owners, max_chunk, multiple):
    chunks = plan_chunks(owners, max_chunk, multiple)
    assert len(set(chunks.row_of.tolist())) == len(owners)
    for owner, row in zip(owners, chunks.row_of, strict=True):
        assert chunks.policy_of[row // chunks.size] == owner
    assert len(chunks.policy_of) % multiple == 0
    assert chunks.size <= max_chunk
    if chunks.size > 1:
        assert len(chunks.policy_of) * chunks.size <= len(owners) * (1 + MAX_EMPTY_SHARE)
    assert np.bincount(chunks.policy_of).size <= 5


def test_parts_of_a_batch_have_chunks_of_one_size_and_as_many():
    # A A A A behind chunks of 2; A B A B needs two of them as well
    parts = [[0, 0, 0, 0], [0, 1, 0, 1]]
    plans = [plan_chunks(own, 2, everyone=parts) for own in parts]
    assert [plan.size for plan in plans] == [2, 2]
    assert [plan.policy_of.tolist() for plan in plans] == [[0, 0], [0, 1]]
    # A B C of the second part would leave half of such chunks empty: then neither has them
    parts = [[0, 0, 0, 0], [0, 1, 2, 2]]
    plans = [plan_chunks(own, 2, everyone=parts) for own in parts]
    assert [plan.size for plan in plans] == [1, 1]
    assert [len(plan.policy_of) for plan in plans] == [4, 4]
