"""General benchmarks: official fields in, official prompts out, faults told by line."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.example import encode_png
from data_pipelines.general_eval import read_mmlu_pro, read_mmmu_pro, read_wildguard
from data_pipelines.nano_base.general import make_general_questions
from data_pipelines.nano_base.text_questions import is_held_out_question

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "general_eval"
MMLU = {
    "question_id": 7,
    "question": "Two?",
    "options": ["one", "two", "N/A"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "A: Let's think step by step. One and one. The answer is (B).",
    "category": "math",
    "src": "made",
}
MMMU = {"id": "test_Art_1", "question": "<image 1> or <image 2>?", "options": "['x', 'y']"}
MMMU |= {"answer": "B", "image_1": "a.png", "image_2": "b.png", "image_3": None, "subject": "Art"}
GUARD = {
    "prompt": "How do I bake?",
    "response": "Use flour.",
    "prompt_harm_label": "unharmful",
    "response_refusal_label": "compliance",
    "response_harm_label": None,
    "adversarial": False,
    "subcategory": "benign",
}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Two pictures beside the files."""
    for number, name in enumerate(("a.png", "b.png")):
        pixels = np.full((28, 28, 3), number, np.uint8)
        (tmp_path / name).write_bytes(encode_png(pixels))
    return [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]


def test_mmlu_pro_prompt(tmp_path):
    file = write_lines(tmp_path / "test.jsonl", MMLU)
    (example,) = read_mmlu_pro(file)
    head = (
        "The following are multiple choice questions (with answers) about math. Think step by step"
        ' and then finish your answer with "the answer is (X)" where X is the correct letter'
        " choice.\n\n\n"
    )
    question = "Question:\nTwo?\nOptions:\nA. one\nB. two\n"
    assert example.query == f"{head}{question}Answer: Let's think step by step."
    assert (example.example_id, example.answer, example.images) == ("mmlu_pro/7", "B", ())
    (shown,) = read_mmlu_pro(file, shots=file)
    worked = "Answer: Let's think step by step. One and one. The answer is (B).\n\n"
    assert shown.query == f"{head}{question}{worked}{question}Answer: Let's think step by step."


def test_mmmu_pro_prompt_and_pictures(tmp_path, pictures):
    (example,) = read_mmmu_pro(write_lines(tmp_path / "test.jsonl", MMMU))
    assert list(example.images) == pictures
    assert example.query == (
        "<image 1> or <image 2>?\nA. x\nB. y\n"
        "Answer with the option letter from the given choices directly."
    )
    vision = {"id": "v", "image": "b.png", "options": "['x', 'y']", "answer": "A", "subject": "Art"}
    (example,) = read_mmmu_pro(write_lines(tmp_path / "vision.jsonl", vision))
    assert list(example.images) == pictures[1:]
    assert "'Answer: $LETTER'" in example.query


def test_parquet_holds_pictures_as_bytes(tmp_path, pictures):
    pyarrow = pytest.importorskip("pyarrow", reason="extra benchmarks is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = MMMU | {"image_1": {"bytes": pictures[0], "path": "a"}, "image_2": None, "image_3": None}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test.parquet")
    (example,) = read_mmmu_pro(tmp_path / "test.parquet")
    assert list(example.images) == pictures[:1]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="no parquet file"):
        read_mmmu_pro(tmp_path / "bad.parquet")


def test_wildguard_prompt_and_labels(tmp_path):
    alone = GUARD | {"response": None, "response_refusal_label": None}
    unlabelled = alone | {"prompt_harm_label": None}
    file = write_lines(tmp_path / "test.jsonl", GUARD, alone, unlabelled)
    one, two = read_wildguard(file)  # the last row asks for nothing
    assert one.answer == "Harmful request: no\nResponse refusal: no"
    assert "\n\nHuman user:\nHow do I bake?\n\nAI assistant:\nUse flour.\n\n---" in one.query
    assert two.answer == "Harmful request: no" and "AI assistant:\n\n\n---" in two.query


def test_faults_are_all_told_with_their_lines(tmp_path):
    file = tmp_path / "bad.jsonl"
    rows = [MMLU, {"question": "a"}, MMLU | {"answer": "C"}, [1], MMLU | {"options": "x("}]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n{\n")
    with pytest.raises(ValueError) as told:
        read_mmlu_pro(file)
    for words in (
        "line 2: field 'answer' is missing",
        "line 2: field 'category' is missing",
        "line 2: field 'options' is missing",
        "line 3: answer 'C' is none of the 2 options",
        "line 4: a list, expected an object",
        "line 5: 'options' is no list",
        "line 6: not JSON",
    ):
        assert words in str(told.value)
    assert "line 1:" not in str(told.value)
    guard = {"prompt": "a", "prompt_harm_label": "bad"}
    with pytest.raises(ValueError) as told:
        read_wildguard(write_lines(tmp_path / "guard.jsonl", guard))
    assert "'prompt_harm_label' is 'bad', expected harmful, unharmful or null" in str(told.value)
    assert "line 1: field 'response' is missing" in str(told.value)


def test_files_that_are_none(tmp_path, pictures):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no row"):
        read_mmlu_pro(empty)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_mmlu_pro(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"\.jsonl, \.json or \.parquet"):
        read_mmlu_pro(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list"):
        read_mmlu_pro(tmp_path / "a.json")
    away = MMMU | {"image_1": "../../etc/passwd", "image_2": "none.png"}
    with pytest.raises(ValueError) as told:
        read_mmmu_pro(write_lines(tmp_path / "away.jsonl", away))
    assert "lies outside" in str(told.value) and "none.png does not exist" in str(told.value)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample files beside the project")
def test_real_samples():
    examples = read_mmlu_pro(SAMPLES / "mmlu_pro_sample.json")
    assert len(examples) == 28 and examples[0].example_id == "mmlu_pro/11285"
    assert "about engineering" in examples[0].query and "J. 4\nAnswer: " in examples[0].query
    with pytest.raises(ValueError) as told:  # the pictures are not among the samples
        read_mmmu_pro(SAMPLES / "mmmu_pro_tool_data.jsonl")
    assert "line 21: image_1: " in str(told.value)


def test_nano_questions_are_about_scenes_of_their_own():
    caption, existence, text = make_general_questions(3)
    assert caption.answer.startswith("I see: ") and caption.answer.endswith(".")
    assert existence.answer.startswith("1. ") and existence.query.count("any ") == 4
    assert caption.images != existence.images
    assert not text.images
    assert is_held_out_question(text.query)
    assert [e.meta["answer_form"]["form"] for e in (caption, existence, text)] == [
        "nano_caption",
        "nano_existence",
        "nano_text",
    ]
