"""Two views of each prompt, and training rows that hold the policy-free one only."""

import numpy as np
import pytest

from tests.tiny_model import load_tiny_processor, make_png, make_question
from trimpi_jax.inputs.encode import encode_with_completion
from trimpi_jax.rollouts.groups import fits, make_training_rows, make_view

BUCKETS = (96, 224)


@pytest.fixture(scope="module")
def processor():
    return load_tiny_processor()


@pytest.fixture(scope="module")
def questions():
    return [make_question(0), make_question(1, query="Which case, please?")]


def view(questions, processor, *, aware, buckets=BUCKETS, windows=2, **options):
    return make_view(
        questions,
        processor,
        policy_in_prompt=aware,
        token_buckets=buckets,
        windows=windows,
        **options,
    )


def test_the_views_differ_by_the_policy_alone(questions, processor):
    free, aware = (view(questions, processor, aware=a) for a in (False, True))
    for question, short, long in zip(questions, free.rows, aware.rows, strict=True):
        texts = [processor.tokenizer.decode(row.tokens) for row in (short, long)]
        user = [text[text.index("<|im_start|>user") :] for text in texts]
        assert user[0] == user[1]
        assert question.policy_text in texts[1]
        assert "# Condition" not in texts[0]


def test_a_view_takes_the_smallest_bucket_that_holds_all(questions, processor):
    assert view(questions, processor, aware=False).batch.tokens.shape == (2, 96)
    assert view(questions, processor, aware=True).batch.tokens.shape == (2, 224)
    padded = view(questions, processor, aware=False, num_rows=4).batch
    assert padded.valid.tolist() == [True, True, False, False]


def test_a_prompt_that_fits_no_bucket_is_named_not_cut(questions, processor):
    with pytest.raises(ValueError, match=r"2 prompts fit no bucket of \[96\] tokens .*q0: \d+ tok"):
        view(questions, processor, aware=True, buckets=(96,))
    wide = make_question(7, images=(make_png(7, 56, 112), make_png(8)))
    with pytest.raises(ValueError, match=r"q7: .* 3 windows"):
        view([wide], processor, aware=False)


@pytest.mark.parametrize(
    ("with_policy", "bucket", "windows", "expected"),
    [(False, 96, 1, True), (True, 96, 1, False), (True, 224, 1, True), (True, 224, 0, False)],
)
def test_fits_looks_at_every_view_that_is_sampled_from(
    questions, processor, with_policy, bucket, windows, expected
):
    assert expected == fits(
        questions[0],
        processor,
        with_policy=with_policy,
        token_buckets=(16, bucket),
        windows=windows,
    )


@pytest.fixture(scope="module")
def training(questions, processor):
    """Two prompts, three completions each: of 2, 0, 4 tokens and of 1, 3, 4."""
    free = view(questions, processor, aware=False)
    lengths = np.array([[2, 0, 4], [1, 3, 4]], np.int32)
    tokens = np.arange(100, 100 + 2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4)
    return free, tokens, lengths, make_training_rows(free, tokens, lengths, (80, 96, 128))


def test_a_training_row_is_the_policy_free_prompt_and_the_completion(training):
    free, tokens, lengths, rows = training
    for q, row in enumerate(free.rows):
        for i in range(3):
            at, prompt, count = q * 3 + i, len(row.tokens), lengths[q, i]
            assert rows.lengths[at] == prompt + count
            expected = [*row.tokens, *tokens[q, i, :count]]
            assert rows.tokens[at, : prompt + count].tolist() == expected
            assert not rows.tokens[at, prompt + count :].any()
            counted = np.flatnonzero(rows.loss_mask[at]).tolist()
            assert counted == list(range(prompt, prompt + count))
    assert rows.valid.all()


def test_the_smallest_row_bucket_is_taken(training):
    free, _, lengths, rows = training
    longest = max(len(row.tokens) + int(lengths[q].max()) for q, row in enumerate(free.rows))
    assert rows.tokens.shape == (6, min(b for b in (80, 96, 128) if b >= longest))


def test_rows_carry_no_patches_of_their_own(training):
    free, _, _, rows = training
    assert rows.patches.shape[:2] == (6, 0)
    for q in range(2):
        prompt = len(free.rows[q].tokens)
        for at in range(3 * q, 3 * q + 3):
            np.testing.assert_array_equal(rows.visual_index[at, :prompt], free.rows[q].visual_index)
            assert (rows.visual_index[at, prompt:] == -1).all()


def test_positions_continue_as_if_the_row_had_been_encoded_whole(questions, processor):
    said = "<think>red</think>"
    whole = encode_with_completion(
        questions[0], processor, said, policy_in_prompt=False, loss_on="completion"
    )
    free = view(questions[:1], processor, aware=False)
    completion = whole.tokens[whole.loss_mask]
    lengths = np.array([[len(completion)]], np.int32)
    rows = make_training_rows(free, completion[None, None], lengths, (128,))
    length = len(whole.tokens)
    np.testing.assert_array_equal(rows.tokens[0, :length], whole.tokens)
    np.testing.assert_array_equal(rows.positions[0, :, :length], whole.positions)
    np.testing.assert_array_equal(rows.loss_mask[0, :length], whole.loss_mask)
    np.testing.assert_array_equal(rows.visual_index[0, :length], whole.visual_index)
    assert rows.rope_delta[0] == whole.rope_delta


def test_no_policy_text_is_in_any_training_row(training, questions, processor):
    rows = training[-1]
    lines = {line for question in questions for line in question.policy_text.splitlines()}
    for tokens, length in zip(rows.tokens, rows.lengths, strict=True):
        text = processor.tokenizer.decode(tokens[:length])
        assert not [line for line in lines if line in text]


def test_a_completion_that_fits_no_row_bucket_is_an_error(training):
    free, tokens, lengths, _ = training
    with pytest.raises(ValueError, match="more than the largest bucket"):
        make_training_rows(free, tokens, lengths, (40,))
