"""The judge, against a server on this machine: what it is shown, retries, cost, kept replies."""

import contextlib
import http.server
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.example import Example
from tests.evaluators.completions import model_texts
from trimpi_jax.evaluators.judge import (
    JudgeSettings,
    choose_responses,
    judge_referral,
    make_question,
    read_score,
)

pytest.importorskip("openai")

EXAMPLES = [
    Example(f"e{i}", (b"pixels",), f"Question {i}?", "yes", policy_text="# Rule 1: be kind.")
    for i in range(4)
]
TEXTS = [f"<think>Thought {i}: Rule 1 says be kind.</think>\\boxed{{yes}}" for i in range(4)]


@contextlib.contextmanager
def serving(answer):
    """A chat completions endpoint; `answer(messages)` gives a text, an HTTP status or a body."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            found = answer(body["messages"])
            content = found if isinstance(found, bytes) else b""
            if isinstance(found, str):
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "stand-in"}
                content = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(found if isinstance(found, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def number_of(messages) -> int:
    """Which of TEXTS a conversation is about."""
    said = messages[1]["content"][-1]["text"]
    return next(i for i in range(4) if f"Thought {i}:" in said)


def judge(url, folder, **changes):
    options: dict[str, Any] = {"model": "stand-in", "responses": 4, "concurrency": 2}
    judge = JudgeSettings(url, **(options | changes))
    return judge_referral(judge, EXAMPLES, TEXTS, folder / "kept.jsonl")


def test_scores_are_read_and_paid_for_once(tmp_path):
    scores = {0: 10, 1: 7.5, 2: 0, 3: 2.5}

    def answer(messages):
        assert messages[0] == {"role": "system", "content": "# Rule 1: be kind."}
        i = number_of(messages)
        assert [part["type"] for part in messages[1]["content"]] == ["text"]  # not the picture
        assert f"Question {i}?" in messages[1]["content"][0]["text"]
        assert "boxed" not in messages[1]["content"][0]["text"]
        return json.dumps({"score": scores[i], "reason": f"because {i}"})

    with serving(answer) as (url, asked):
        verdicts, summary = judge(url, tmp_path, price_prompt=2.0, price_completion=10.0)
        assert [verdict.score for verdict in verdicts] == [10, 7.5, 0, 2.5]
        assert verdicts[2].reason == "because 2" and verdicts[2].problem == ""
        assert (summary["judged"], summary["unjudged"], summary["score"]) == (4, 0, 5.0)
        # deviations 5, 2.5, -5, -2.5: sqrt(62.5 / 3 / 4)
        assert summary["standard_error"] == pytest.approx((62.5 / 12) ** 0.5)
        assert (summary["requests"], summary["prompt_tokens"]) == (4, 400)
        assert summary["cost"] == pytest.approx(400 * 2e-6 + 40 * 10e-6)
        again, second = judge(url, tmp_path)
        assert len(asked) == 4  # nothing was asked again
        assert [verdict.score for verdict in again] == [10, 7.5, 0, 2.5]
        assert (second["from_file"], second["requests"], second["cost"]) == (4, 0, None)
        judge(url, tmp_path, model="another")
        assert len(asked) == 8  # another judge is another question
    assert asked[0]["temperature"] == 0.0


def test_nonsense_is_asked_again_and_counted_and_never_a_score(tmp_path):
    tries = {}

    def answer(messages):
        i = number_of(messages)
        tries[i] = tries.get(i, 0) + 1
        if i == 0 and tries[i] == 1:
            return "I would rather not."
        if i == 1:
            return '{"score": 11}'
        if i == 2:
            return 400
        if i == 3 and tries[i] == 1:
            return b"<html>no JSON</html>"
        return '{"score": 8, "reason": "fine"}'

    with serving(answer) as (url, asked):
        verdicts, summary = judge(url, tmp_path, attempts=2)
    assert [verdict.score for verdict in verdicts] == [8, None, None, 8]
    assert [verdict.problem for verdict in verdicts] == ["", "score_out_of_range", "http_400", ""]
    assert (summary["judged"], summary["unjudged"], summary["score"]) == (2, 2, 8.0)
    assert summary["problems"]["no_score"] == 1
    assert summary["problems"]["score_out_of_range"] == summary["problems"]["http_400"] == 2
    assert sum(summary["problems"].values()) == 6 and summary["requests"] == 8 == len(asked)
    # what could not be read is asked again by the next start; what could is not
    with serving(lambda messages: '{"score": 4}') as (url2, asked):
        moved = (tmp_path / "kept.jsonl").read_text()
        assert len(moved.splitlines()) == 2
        judge(url2, tmp_path)
        assert len(asked) == 4  # another endpoint is another judge


def test_a_judge_that_never_answers_leaves_everything_unjudged(tmp_path, monkeypatch):
    monkeypatch.setattr("trimpi_jax.io.chat_endpoint.MAX_RETRIES", 0)
    gone = threading.Event()

    def answer(messages):
        gone.wait()
        return 500

    with serving(answer) as (url, _):
        try:
            verdicts, summary = judge(url, tmp_path, attempts=2, timeout_s=0.2, concurrency=4)
        finally:
            gone.set()
    assert {verdict.score for verdict in verdicts} == {None}
    assert (summary["score"], summary["judged"], summary["unjudged"]) == (None, 0, 4)
    assert summary["problems"] == {"timeout": 8}
    assert not (tmp_path / "kept.jsonl").exists()


def test_failures_of_the_server_are_retried_by_the_client(tmp_path):
    tries = {}

    def answer(messages):
        i = number_of(messages)
        tries[i] = tries.get(i, 0) + 1
        return 503 if tries[i] == 1 else '{"score": 6}'

    with serving(answer) as (url, _):
        _, summary = judge(url, tmp_path, attempts=1)
    assert (summary["judged"], summary["score"], summary["problems"]) == (4, 6.0, {})


def test_a_judge_that_breaks_off_leaves_what_it_said(tmp_path):
    done = []

    def answer(messages):
        done.append(1)
        return '{"score": 6}' if len(done) < 3 else 401

    with serving(answer) as (url, _):
        with pytest.raises(ValueError, match="401"):
            judge(url, tmp_path, concurrency=1)
        with (tmp_path / "kept.jsonl").open("a") as file:
            file.write('{"key": "cut of')  # by a kill
        done.clear()
        _, summary = judge(url, tmp_path, concurrency=1)
    assert (summary["from_file"], summary["requests"], summary["judged"]) == (2, 2, 4)


def test_without_an_endpoint_or_with_one_that_is_not_there(tmp_path, monkeypatch):
    for url, model in (("", ""), ("http://x/v1", ""), ("", "m")):
        with pytest.raises(ValueError, match="there is no default: set base_url"):
            JudgeSettings(url, model)
    monkeypatch.setattr("trimpi_jax.io.chat_endpoint.MAX_RETRIES", 0)
    with serving(lambda messages: 500) as (url, _):
        pass
    with pytest.raises(ValueError, match="Is the server running"):
        judge(url, tmp_path)
    with pytest.raises(ValueError, match="no response to judge"):
        judge_referral(JudgeSettings(url, "m"), [], [], tmp_path / "kept.jsonl")
    with pytest.raises(ValueError, match="have no policy"):
        judge_referral(
            JudgeSettings(url, "m"), [Example("e", (), "?", "yes")], ["x"], tmp_path / "k"
        )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": 7, "reason": "x"}', (7.0, "")),
        ('```json\n{"score": 9.5}\n```', (9.5, "")),
        ("score: 3/10", (3.0, "")),
        ('<think>a score: 2 would be harsh</think>{"score": 8}', (8.0, "")),
        ('{"score": -1}', (None, "score_out_of_range")),
        ('{"score": 70}', (None, "score_out_of_range")),
        ('{"score": null}', (None, "no_score")),
        ("seven of ten", (None, "no_score")),
        ("", (None, "no_score")),
    ],
)
def test_what_is_a_score(reply, expected):
    assert read_score(reply) == expected


def test_responses_are_spread_evenly():
    assert choose_responses(10, 5) == [0, 2, 4, 6, 8]
    assert choose_responses(3, 100) == [0, 1, 2]
    assert len(set(choose_responses(2000, 100))) == 100


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.one_of(model_texts, st.text(st.characters(categories=["Cs", "L"]), max_size=20)))
def test_no_text_breaks_the_question_or_leaves_its_quotes(text):
    messages = make_question(EXAMPLES[0], text)
    json.dumps(messages).encode()
    said = messages[1]["content"][-1]["text"]
    said.encode()
    mark = said.partition("<quoted-")[2][:12]
    assert said.count(f"</quoted-{mark}>") == 3  # named once, closed twice
    score, problem = read_score(text)
    assert (score is None) == bool(problem) and 0 <= (score or 0) <= 10
