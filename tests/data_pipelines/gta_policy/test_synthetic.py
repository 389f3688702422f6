"""Synthetic tasks: what a tool returned is what it would return on the image that is there."""

import ast
import collections
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines.clevr.renderer import render_masks
from data_pipelines.example import decode_image
from data_pipelines.gta_policy import drawing
from data_pipelines.gta_policy.catalogue import (
    K_CLOSED,
    K_OPEN,
    TOOLS,
    call_json,
    find_argument_problems,
)
from data_pipelines.gta_policy.families import scenes
from data_pipelines.gta_policy.synthetic import FAMILIES, make_tasks
from trimpi_jax.grading.answers import find_boxes
from trimpi_jax.grading.tool_calls import evaluate_expression, parse_bbox

DRAWS = 3


def name(i):
    return f"image/image_{i + 1}.jpg"


def draw(family, k):
    return FAMILIES[family](np.random.default_rng([5, k]), name)


@pytest.fixture(scope="module")
def drafts():
    return {family: [draw(family, k) for k in range(DRAWS)] for family in FAMILIES}


def all_steps(drafts, tool=None):
    for family, found in drafts.items():
        for draft in found:
            images = {name(i): decode_image(data) for i, data in enumerate(draft.images)}
            for number, step in enumerate(draft.steps):
                if tool in (None, step.tool):
                    yield family, draft, images, number, step


@pytest.fixture(scope="module")
def tasks():
    return make_tasks("train", 110, 3, 1)


def test_there_are_enough_families_and_every_tool_is_used(tasks):
    assert len(FAMILIES) >= 10
    assert {step.tool for task in tasks for step in task.steps} == set(TOOLS)
    assert {task.family for task in tasks} == set(FAMILIES)


def test_calls_obey_the_catalogue(drafts):
    for family, draft, images, _, step in all_steps(drafts):
        assert find_argument_problems(step.tool, step.arguments) == [], family
        if "image" in step.arguments:
            assert step.arguments["image"] in images, family
        if step.tool == "GoogleSearch":
            k = K_OPEN if draft.open_ended else K_CLOSED
            assert step.arguments["k"] == k
            assert len(step.returned.splitlines()) == k
        assert step.thought.endswith("."), (family, step.thought)


def test_a_boxed_gold_call_comes_back_whole(drafts):
    for family, _, _, _, step in all_steps(drafts):
        gold = call_json(step.tool, step.arguments)
        assert [content for _, content, _ in find_boxes(f"\\boxed{{{gold}}}")] == [gold], family


def test_several_images_are_described_first(drafts):
    for family, found in drafts.items():
        for draft in found:
            if len(draft.images) > 1:
                first = [step.tool for step in draft.steps[: len(draft.images)]]
                assert set(first) == {"ImageDescription"}, family


def test_text_stands_where_ocr_says(drafts):
    """A box holds ink, reaches its edges, and the margin around it holds none of that text."""
    seen = 0
    for family, _, images, _, step in all_steps(drafts, "OCR"):
        pixels = images[step.arguments["image"]].astype(int)
        height, width, _ = pixels.shape
        for row in step.returned.splitlines():
            found = re.fullmatch(r"(\(\d+, \d+, \d+, \d+\)) (.+)", row)
            assert found, row
            x1, y1, x2, y2 = ast.literal_eval(found[1])
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height, (family, row)
            inside = pixels[y1:y2, x1:x2].sum(axis=2)
            assert inside.max() - inside.min() > 120, (family, row)
            if found[2].isupper() and len(found[2]) > 3:  # capitals fill their box
                ink = np.abs(inside - np.median(inside)) > 60
                rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
                assert rows[0] <= 2 and rows[-1] >= y2 - y1 - 3, (family, row)
                assert columns[0] <= 3 and columns[-1] >= x2 - x1 - 4, (family, row)
            seen += 1
    assert seen > 200


def test_the_numbers_of_the_expression_are_known_before(drafts):
    """Every number in a Calculator call was read, counted or asked: nothing falls from the sky."""
    for family, draft, _, number, step in all_steps(drafts, "Calculator"):
        told = " ".join([draft.request, *(earlier.returned for earlier in draft.steps[:number])])
        known = {float(n) for n in re.findall(r"\d+(?:\.\d+)?", told)}
        expression = re.sub(r"^round\((.*), \d\)$", r"\1", step.arguments["expression"])
        expression = re.sub(r" / \d+$", "", expression) if "mean" in draft.request else expression
        for text in re.findall(r"\d+(?:\.\d+)?", expression):
            assert float(text) in known | {2.0, 3.0, 100.0, 1.0}, (family, step.arguments, told)


def test_the_calculator_returned_the_value(drafts):
    for family, _, _, _, step in all_steps(drafts, "Calculator"):
        value = evaluate_expression(step.arguments["expression"])
        assert value is not None, family
        assert float(step.returned) == pytest.approx(value, rel=1e-9), (family, step.arguments)


def run_code(command):
    code = re.fullmatch(r"```python\n(.*)\n```", command, re.S)
    assert code, command
    names = {}
    exec(code[1], names)  # our own text, not a model's
    return names["solution"]()


def test_the_solver_returned_the_solutions(drafts):
    sympy = pytest.importorskip("sympy", reason="sympy is not installed")
    solved = 0
    for draft in [draw("equation", k) for k in range(40)]:
        read, solve = draft.steps
        assert run_code(solve.arguments["command"]) == solve.returned
        x, y = sympy.symbols("x y")
        for solution in solve.returned.strip("[]").split("}, "):
            values = {
                {"x": x, "y": y}[letter]: int(value)
                for letter, value in re.findall(r"([xy]): (-?\d+)", solution)
            }
            for equation in read.returned.split(r" \\ "):
                left, right = (
                    re.sub(r"(\d)([xy])", r"\1*\2", equation).replace("^", "**").split("=")
                )
                assert sympy.sympify(left).subs(values) == int(right)
                solved += 1
    assert solved > 40


def test_the_plot_code_draws_the_values(drafts):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = 0
    for k in range(8):
        for family in ("bar_chart", "weather_table"):
            *_, step = draw(family, k).steps
            if step.tool == "Plot":
                figure = run_code(step.arguments["command"])
                texts = {t.get_text() for t in figure.axes[0].texts}
                labels = ast.literal_eval(
                    re.search(r"labels = (\[.*\])", step.arguments["command"])[1]
                )
                assert family == "weather_table" or set(labels) <= texts
                plt.close(figure)
                drawn += 1
    assert drawn >= 2


def test_boxes_and_counts_are_those_of_the_scene():
    """The box of the named solid is that of its visible pixels; counts are those of the scene."""
    rng = np.random.default_rng(11)
    scene, _, boxes = scenes._make_clevr(rng, 4)
    width, height = scenes.CLEVR_SIZE
    (mask,) = render_masks([scene], width=width, height=height)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        outside = mask.copy()
        outside[y1:y2, x1:x2] = 0
        assert not (outside == i + 1).any()
        for edge in (mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]):
            assert (edge == i + 1).any()
    for phrase, number in scenes._phrases(scene.objects):
        words = set(phrase.split()) - {"object"}
        fitting = [o for o in scene.objects if words <= {o.color, o.size, o.material, o.shape}]
        assert len(fitting) == number


@pytest.mark.parametrize("seed", range(6))
def test_counted_cars_are_really_painted(seed):
    """Cars of the asked colour, counted again as patches of its paint between the lines."""
    rng = np.random.default_rng(seed)
    draft = FAMILIES["parking"](rng, name)
    step = draft.steps[3]
    color = step.arguments["text"].split()[0]
    paint = np.array(drawing._rgb({"red": "#c0262d", "blue": "#2456b8", "white": "#f4f4f2",
                                   "yellow": "#f2c21a"}[color]))  # fmt: skip
    pixels = decode_image(draft.images[1]).astype(int)
    close = np.abs(pixels - paint).max(axis=2) < 24
    found = sum(
        close[y : y + 130, 20 + 74 * column + 8 : 20 + 74 * column + 66].mean() > 0.2
        for y in (10, 192)
        for column in range(6)
    )
    assert found == int(step.returned)


def test_boxes_lie_in_their_image(drafts):
    for family, _, images, _, step in all_steps(drafts):
        if "bbox" in step.arguments:
            box = parse_bbox(step.arguments["bbox"])
            height, width, _ = images[step.arguments["image"]].shape
            assert box and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height, family


def test_the_same_seed_draws_the_same(drafts):
    for family, (first, *_) in drafts.items():
        assert draw(family, 0) == first, family
        assert draw(family, 1) != first, family


@pytest.mark.parametrize("steps", [2, 3, 7, 40])
def test_a_split_has_exactly_its_steps(steps):
    tasks = make_tasks("test", steps, 1, 10)
    assert sum(len(task.steps) for task in tasks) == steps
    names = [image.name for task in tasks for image in task.images]
    assert names == [f"image/image_{10 + i}.jpg" for i in range(len(names))]
    assert len({task.task_id for task in tasks}) == len(tasks)


def test_one_step_is_no_split():
    with pytest.raises(ValueError, match="at least 2"):
        make_tasks("test", 1, 0, 1)


def test_families_take_turns(tasks):
    counts = collections.Counter(task.family for task in tasks)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_images_are_jpeg_of_a_readable_size(drafts):
    for family, found in drafts.items():
        for data in (data for draft in found for data in draft.images):
            image = Image.open(io.BytesIO(data))
            assert image.format == "JPEG"
            assert 300 <= image.width <= 640 and 100 <= image.height <= 520, family
            assert len(data) < 100_000, family


def test_facts_stay_json(drafts):
    for _, _, _, _, step in all_steps(drafts):
        assert json.loads(json.dumps(step.arguments)) == step.arguments
