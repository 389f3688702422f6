"""A tree of questions equals one row a question: tokens, positions, hidden states."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.clevr_policy import wording
from data_pipelines.example import Example, encode_png
from tests.data_pipelines.policy_reader import BLUE_SPHERE, RED_CUBE, RED_CYLINDER, TREE
from tests.tiny_model import load_tiny_processor, tiny_config, tiny_params
from trimpi_jax.inputs.batching import make_batch
from trimpi_jax.inputs.encode import encode_example, encode_with_completion
from trimpi_jax.inputs.policy_trees import DoesNotFit, TreeShape, make_tree_batch
from trimpi_jax.models import vlm
from trimpi_jax.stages.nano_reading import tree_hidden_states

SHAPE = TreeShape(rows=1, branches=2, policy_tokens=200, branch_tokens=160, policy_pictures=1)
SIZES = {"picture_px": (56, 112), "policy_picture_px": (56, 56)}


def picture(seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_png(pixels)


def questions(shown=("1",)):
    for number, things in enumerate(([RED_CUBE, BLUE_SPHERE], [RED_CYLINDER])):
        yield Example(
            str(number),
            (picture(number, 56, 112),),
            wording.query(TREE.name),
            "Case 1",
            cot=wording.chain_of_thought(TREE, things, shown),
            policy_name=TREE.name,
            policy_text=wording.policy_text(TREE, shown),
            policy_images=(picture(9, 56, 56),) * len(shown),
        )


def whole_rows(examples, processor):
    return [
        encode_example(e, processor, policy_in_prompt=True, with_cot=True, loss_on="completion")
        for e in examples
    ]


@pytest.mark.parametrize("shown", [(), ("1",)])
def test_policy_and_branch_are_the_whole_row(shown):
    processor = load_tiny_processor()
    examples = list(questions(shown))
    tree = make_tree_batch([examples], processor, SHAPE, **SIZES)
    first = int(tree.lengths[0])
    for branch, row in enumerate(whole_rows(examples, processor)):
        rest = len(row.tokens) - first
        joined = np.concatenate([tree.tokens[0, :first], tree.branch_tokens[0, branch, :rest]])
        assert joined.tolist() == row.tokens.tolist()
        places = np.concatenate(
            [tree.positions[0, :, :first], tree.branch_positions[0, :, branch, :rest]], axis=1
        )
        assert places.tolist() == row.positions.tolist()
        assert tree.loss_mask[0, branch, :rest].tolist() == row.loss_mask[first:].tolist()
        assert not tree.loss_mask[0, branch, rest:].any()


def test_hidden_states_equal_those_of_whole_rows():
    processor, config = load_tiny_processor(), tiny_config()
    params = tiny_params(config)
    examples = list(questions())
    rows = whole_rows(examples, processor)
    batch = make_batch(rows, num_rows=2, num_tokens=320, num_windows=3)
    visual = vlm.encode_images(params, config, batch.patches, batch.patch_hw, batch.patch_segment)
    expected = vlm.hidden_states(
        params, config, batch.tokens, batch.positions, batch.lengths, visual, batch.visual_index
    )
    tree = make_tree_batch([examples], processor, SHAPE, **SIZES)
    # slots of the policy's picture and of the question's own one, both row by row
    slots = [np.asarray(rows[0].images.slots[i]) for i in (0, 1)]
    policy_visual, own = visual[:1, slots[0]], visual[None, :, slots[1]]
    actual = jax.jit(tree_hidden_states, static_argnums=1)(params, config, tree, own, policy_visual)
    first = int(tree.lengths[0])
    for branch, row in enumerate(rows):
        rest = len(row.tokens) - first
        np.testing.assert_allclose(
            actual[0, branch, :rest], expected[branch, first : len(row.tokens)], atol=2e-5
        )


def test_questions_without_a_policy_stand_behind_the_default_message():
    processor = load_tiny_processor()
    plain = [
        dataclasses.replace(e, policy_text="", policy_images=(), cot="", answer="I see: it.")
        for e in questions(())
    ]
    tree = make_tree_batch([plain], processor, SHAPE, **SIZES)
    first = int(tree.lengths[0])
    for branch, example in enumerate(plain):
        row = encode_with_completion(
            example, processor, example.answer, policy_in_prompt=False, loss_on="completion"
        )
        rest = len(row.tokens) - first
        joined = [*tree.tokens[0, :first], *tree.branch_tokens[0, branch, :rest]]
        assert joined == row.tokens.tolist()


@pytest.mark.parametrize(
    ("change", "part"), [({"policy_tokens": 20}, "policy"), ({"branch_tokens": 40}, "question")]
)
def test_what_does_not_fit_is_told(change, part):
    shape = dataclasses.replace(SHAPE, **change)
    with pytest.raises(DoesNotFit, match=f"a {part} of .* tokens"):
        make_tree_batch([list(questions())], load_tiny_processor(), shape, **SIZES)
