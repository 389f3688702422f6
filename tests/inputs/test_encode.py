"""Rows as drawn in encode.py: what is in them, what counts as a target, where the images stand."""

import numpy as np
import pytest

from data_pipelines.example import IMAGE_MARK
from tests.tiny_model import load_tiny_processor, make_png, make_question
from trimpi_jax.inputs.encode import encode_example, encode_prompt, encode_with_completion
from trimpi_jax.models.processor import encode_text
from trimpi_jax.stages.sft import encode_sft_row
from trimpi_jax.stages.vm_cpt import encode_vm_cpt_row


@pytest.fixture(scope="module")
def processor():
    return load_tiny_processor()


def read(processor, tokens) -> str:
    return processor.tokenizer.decode(tokens)


def test_a_policy_free_prompt_reads_as_the_chat_template_says(processor):
    row = encode_prompt(make_question(query="Which case?"), processor, policy_in_prompt=False)
    assert read(processor, row.tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|>"
        "<|vision_end|>Which case?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not row.loss_mask.any()


def test_the_policy_is_the_system_message_and_comes_first(processor):
    question = make_question(query="Which case?")
    row = encode_prompt(question, processor, policy_in_prompt=True)
    text = read(processor, row.tokens)
    assert text.startswith(
        f"<|im_start|>system\n{question.policy_text}<|im_end|>\n<|im_start|>user"
    )
    assert "helpful assistant" not in text
    assert text.count(question.policy_text) == 1


def test_policy_free_rows_never_hold_policy_text(processor):
    question = make_question()
    lines = question.policy_text.splitlines()
    rows = [
        encode_prompt(question, processor, policy_in_prompt=False),
        encode_sft_row(question, processor, stage="direct_sft"),
        encode_sft_row(question, processor, stage="cot_sft"),
    ]
    for row in rows:
        text = read(processor, row.tokens)
        assert not [line for line in lines if line in text]
    aware = encode_prompt(question, processor, policy_in_prompt=True)
    assert all(line in read(processor, aware.tokens) for line in lines)  # and they could be seen


def test_sft_counts_the_completion_and_nothing_else(processor):
    question = make_question()
    prompt = encode_prompt(question, processor, policy_in_prompt=False)
    for stage, said in (
        ("direct_sft", "\\boxed{Case 3}<|im_end|>"),
        ("cot_sft", f"<think>{question.cot}</think>\\boxed{{Case 3}}<|im_end|>"),
    ):
        row = encode_sft_row(question, processor, stage=stage)
        assert np.array_equal(row.tokens[: len(prompt.tokens)], prompt.tokens)
        assert not row.loss_mask[: len(prompt.tokens)].any()
        assert row.loss_mask[len(prompt.tokens) :].all()
        assert read(processor, row.tokens[row.loss_mask]) == said
        assert row.tokens[-1] == processor.stop_token_ids[0]


def test_vm_cpt_counts_every_text_token_and_no_visual_one(processor):
    question = make_question(
        policy_text=f"Red looks like {IMAGE_MARK} here.\n# Condition 1",
        policy_images=(make_png(5),),
    )
    row = encode_vm_cpt_row(question, processor)
    visual = row.tokens == processor.image_token_id
    assert visual.sum() == 4 + 4  # the policy's image and the question's
    assert np.array_equal(row.visual_index >= 0, visual)
    assert not row.loss_mask[visual].any()
    assert row.loss_mask[1:][~visual[1:]].all()
    assert not row.loss_mask[0]  # nothing comes before the first token
    counted = read(processor, row.tokens[row.loss_mask])
    for part in ("# Condition 1", "Red looks like", question.query, question.cot, "Case 3"):
        assert part in counted


def test_policy_images_stand_at_their_marks_before_the_questions_images(processor):
    one, two = make_png(5, 28, 56), make_png(6, 56, 28)
    question = make_question(
        policy_text=f"A {IMAGE_MARK} B {IMAGE_MARK}", policy_images=(one, two), query="Q"
    )
    aware = encode_prompt(question, processor, policy_in_prompt=True)
    pad = "<|image_pad|>"
    two_cells = f"<|vision_start|>{2 * pad}<|vision_end|>"
    assert (
        f"system\nA {two_cells} B {two_cells}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{4 * pad}<|vision_end|>Q"
    ) in read(processor, aware.tokens)
    assert aware.images.grids == [(1, 2, 4), (1, 4, 2), (1, 4, 4)]
    free = encode_prompt(question, processor, policy_in_prompt=False)
    assert free.images.grids == [(1, 4, 4)]
    # the same picture of the question in both rows
    np.testing.assert_array_equal(free.images.patches[0], aware.images.patches[-1])


def test_every_visual_token_has_a_slot_of_its_own_image(processor):
    question = make_question(images=(make_png(1, 56, 84), make_png(2, 28, 28)))
    row = encode_prompt(question, processor, policy_in_prompt=False)
    slots = row.visual_index[row.visual_index >= 0]
    assert len(slots) == 6 + 1
    assert len(set(slots.tolist())) == 7
    segment = row.images.patch_segment.reshape(-1, 4)[:, 0]  # [M], of each merged slot
    assert segment[slots].tolist() == [1] * 6 + [2]


def test_positions_go_on_after_the_image_as_the_delta_says(processor):
    row = encode_prompt(make_question(), processor, policy_in_prompt=False)
    # 4 visual tokens take max(2, 2) = 2 positions, so the next token stands 2 earlier
    assert row.rope_delta == -2
    assert (row.positions[:, -1] == len(row.tokens) - 1 - 2).all()
    first = int(np.argmax(row.visual_index >= 0))
    cells = row.positions[:, first : first + 4] - first
    assert cells.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]


def test_a_given_completion_is_continued_exactly(processor):
    row = encode_with_completion(
        make_question(), processor, "hello", policy_in_prompt=False, loss_on="completion"
    )
    expected = [*encode_text(processor, "hello"), processor.stop_token_ids[0]]
    assert row.tokens[row.loss_mask].tolist() == expected


def test_a_missing_chain_of_thought_is_an_error(processor):
    with pytest.raises(ValueError, match="q0 has no chain of thought"):
        encode_example(
            make_question(cot=""),
            processor,
            policy_in_prompt=False,
            with_cot=True,
            loss_on="completion",
        )


def test_a_missing_policy_is_an_error_only_where_it_is_wanted(processor):
    question = make_question(policy_text="")
    with pytest.raises(ValueError, match="q0 has no policy text"):
        encode_prompt(question, processor, policy_in_prompt=True)
    encode_prompt(question, processor, policy_in_prompt=False)


@pytest.mark.parametrize(
    ("changes", "aware"),
    [
        ({"query": "what is <|image_pad|>?"}, False),  # a mark smuggled into a text
        ({"policy_text": f"one {IMAGE_MARK} two"}, True),  # a mark without its image
        ({"policy_images": (make_png(3),)}, True),  # an image without its mark
    ],
)
def test_marks_and_images_must_agree(processor, changes, aware):
    with pytest.raises(ValueError, match="image marks but"):
        encode_prompt(make_question(**changes), processor, policy_in_prompt=aware)


def test_an_unreadable_image_names_its_example(processor):
    with pytest.raises(ValueError, match="example q9, image 0"):
        encode_prompt(make_question(9, images=(b"junk",)), processor, policy_in_prompt=False)


def test_a_question_without_images_is_text_only(processor):
    row = encode_prompt(make_question(images=()), processor, policy_in_prompt=False)
    assert row.images.patches.shape[0] == 0
    assert (row.visual_index == -1).all()
    assert row.positions.tolist() == [list(range(len(row.tokens)))] * 3


@pytest.mark.parametrize(
    ("changes", "aware", "message"),
    [
        ({"images": (make_png(0, 2, 500),)}, False, "aspect ratio above 200"),
        ({"query": "what is <|image_pad|>?"}, False, "2 image marks but 1 images"),
        ({"images": ()}, False, ""),
        ({"policy_text": f"A {IMAGE_MARK} policy"}, True, "2 image marks but 1 images"),
        ({"policy_images": (make_png(),)}, True, "1 image marks but 2 images"),
        ({"images": (b"GIF89a",)}, False, "no readable image"),
    ],
)
def test_what_cannot_be_encoded_is_told_with_its_example(processor, changes, aware, message):
    question = make_question(7, **changes)
    if not message:  # a question without images is whole
        encode_prompt(question, processor, policy_in_prompt=aware)
        return
    with pytest.raises(ValueError, match=f"example q7[:,].*{message}"):
        encode_prompt(question, processor, policy_in_prompt=aware)
