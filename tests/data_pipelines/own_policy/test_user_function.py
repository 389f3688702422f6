"""A user's function that raises, hangs, ends the process, prints, or returns nonsense."""

import pytest

from data_pipelines.own_policy.user_function import (
    call_user_function,
    file_sha256,
    read_verdict,
)

FUNCTION = """
import os, sys, time
import neighbour
print("to be ignored")

def grade(answer, gold, example):
    print("also ignored")
    if answer == "hang":
        while True:
            pass
    if answer == "exit":
        os._exit(3)
    if answer == "quit":
        sys.exit(0)
    if answer == "raise":
        raise ZeroDivisionError("by hand")
    if answer == "nan":
        return float("nan")
    if answer == "none":
        return None
    if answer == "parts":
        return {"score": 0.5, "tone": 1, "facts": 0.0}
    return neighbour.RIGHT if answer == gold else len(example["query"]) / 100
"""


def calls(*answers):
    return [{"answer": a, "gold": "right", "example": {"query": "four"}} for a in answers]


def test_every_kind_of_answer(tmp_path):
    (tmp_path / "neighbour.py").write_text("RIGHT = True\n")
    file = tmp_path / "grade.py"
    file.write_text(FUNCTION)
    answers = ("right", "hang", "exit", "quit", "raise", "nan", "none", "parts", "wrong é")
    found = call_user_function(str(file), "grade", 0.5, calls(*answers))
    scores = dict(zip(answers, found, strict=True))
    assert scores["right"] == (1.0, {}, "")
    assert scores["wrong é"] == (0.04, {}, "")
    assert scores["parts"] == (0.5, {"tone": 1.0, "facts": 0.0}, "")
    assert scores["raise"].error == "ZeroDivisionError: by hand"
    assert scores["nan"].error == "'score' is nan"
    assert scores["none"].error == "'score' is None, not a number"
    for name in ("hang", "exit", "quit"):
        assert scores[name].score == 0 and "no answer within 0.5 s" in scores[name].error


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1.5, "the score 1.5 is not in [0, 1]"),
        (-0.1, "not in [0, 1]"),
        ({"tone": 1}, "without 'score'"),
        ({"score": 1, "tone": "good"}, "'tone' is 'good', not a number"),
        ({"score": 1, "tone": float("inf")}, "'tone' is inf"),
    ],
)
def test_what_is_no_score(value, error):
    assert error in read_verdict(value).error and read_verdict(value).score == 0


def test_a_changed_or_missing_file_is_refused(tmp_path):
    file = tmp_path / "grade.py"
    file.write_text("def grade(answer, gold, example):\n    return 1.0\n")
    seen = file_sha256(file)
    assert call_user_function(str(file), "grade", 5.0, calls("x"), sha256=seen)[0].score == 1
    file.write_text("def grade(answer, gold, example):\n    return 0.9\n")
    with pytest.raises(ValueError, match="was changed since the dataset was built"):
        call_user_function(str(file), "grade", 5.0, calls("x"), sha256=seen)
    with pytest.raises(ValueError, match="is gone"):
        call_user_function(str(tmp_path / "none.py"), "grade", 5.0, calls("x"))
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        call_user_function(str(file), "grade", 5.0, calls("x"))
