"""The summary of graded answers by hand, with graders that give parts of a point."""

import pytest

from trimpi_jax.evaluators.questions import summarize


def record(accuracy, reason="ok", **details):
    return {
        "accuracy": accuracy,
        "format": reason,
        "prompt_tokens": 10,
        "details": details,
        "groups": {},
    }


def test_parts_of_a_point_are_a_score_and_not_right_answers():
    summary = summarize(
        [
            record(1.0, tone=1.0, fields={"a": 1.0}),
            record(0.5, tone=0.5),
            record(0.0, problem="function_error", error="ValueError: oh"),
            record(0.0, "no_box", problem="no_box"),
        ]
    )
    assert (summary["correct"], summary["accuracy"], summary["score"]) == (1, 0.25, 0.375)
    assert summary["details"] == {"tone": pytest.approx(0.75)}
    assert summary["problems"] == {"function_error": 1, "no_box": 1}
    assert summary["format_rate"] == 0.75 and summary["format_failures"] == {"no_box": 1}
