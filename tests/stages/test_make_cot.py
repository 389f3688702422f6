"""Chains of thought by a generator: what is kept, what is sent, resume, and an actor of ours.

The endpoint is a server on this machine that looks its answers up by the bytes of the image, so a
right reply proves that image, policy and query arrived.
"""

import base64
import contextlib
import http.server
import json
import threading

import numpy as np
import pytest

from data_pipelines.building import write_dataset
from data_pipelines.clevr.scene import Scene
from data_pipelines.clevr_policy.crops import Crop
from data_pipelines.clevr_policy.dataset import make_example
from data_pipelines.clevr_policy.document import make_document
from data_pipelines.example import completion_text, encode_png
from data_pipelines.shards import check_dataset
from data_pipelines.streaming import read_split
from tests.data_pipelines.policy_reader import (
    BLUE_SPHERE,
    GREEN_CUBE,
    RED_CUBE,
    RED_CYLINDER,
    TREE,
    read_policy,
)
from trimpi_jax.io.chat_endpoint import Reply
from trimpi_jax.make_cot import main
from trimpi_jax.stages import make_cot
from trimpi_jax.stages.make_cot import CotSettings, judge, run

pytest.importorskip("openai")

OBJECTS = [(RED_CUBE,), (RED_CYLINDER, GREEN_CUBE), (GREEN_CUBE,), (BLUE_SPHERE,)]
CROP = Crop("1", RED_CUBE, encode_png(np.full((28, 28, 3), 99, np.uint8)))


def picture(number: int) -> bytes:
    return encode_png(np.full((28, 28, 3), 10 * number, np.uint8))


def write_source(folder, crops=(), per_policy=4):
    document = make_document(TREE, crops)
    train = [
        make_example(document, Scene(f"s{i}", OBJECTS[i % 4]), picture(i), with_cot=False)
        for i in range(per_policy)
    ]
    test = [make_example(document, Scene("t", OBJECTS[0]), picture(20), with_cot=False)]
    write_dataset(folder, {"train": train, "cot": [], "test": test}, {"dataset": "clevr_policy_t"})
    return {example.images[0]: example for example in train}


@contextlib.contextmanager
def serving(answer):
    """A chat completions endpoint; `answer(messages, images)` gives text or an HTTP status."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [
                base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
                for part in body["messages"][-1]["content"]
                if part["type"] == "image_url"
            ]
            asked.append(body)
            found = answer(body["messages"], images)
            status, text = (found, "") if isinstance(found, int) else (200, found)
            choice = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": text}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "stand-in"}
            content = json.dumps(reply | {"choices": [choice]}).encode()
            self.send_response(status)
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


def settings_for(tmp_path, url, **changes):
    options = {"data": str(tmp_path / "in"), "out": str(tmp_path / "out"), "model": "stand-in"}
    defaults = {"base_url": url, "examples": 4, "concurrency": 1, "attempts": 3}
    return CotSettings(**(options | defaults | changes))


EXAMPLE = make_example(make_document(TREE), Scene("s", (RED_CUBE,)), b"", with_cot=True)  # Case 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>red, a cube</think>\\boxed{Case 3}", "accepted"),
        ("<think>red</think>So the response is \\boxed{Case 3}.", "accepted"),
        ("<think>red</think>\\boxed{Case 1}", "wrong_answer"),
        ("<think>red</think>Case 3", "no_box"),
        ("red, a cube \\boxed{Case 3}", "no_think"),
        ("<think> </think>\\boxed{Case 3}", "no_think"),
        ("<think>a</think><think>b</think>\\boxed{Case 3}", "repeated_think"),
        ("<think>it is \\boxed{Case 3}</think>\\boxed{Case 3}", "box_in_thought"),
    ],
)
def test_what_is_kept(text, reason, tmp_path):
    settings = settings_for(tmp_path, "http://x")
    cot, found = judge(settings, EXAMPLE, Reply(text, True))
    assert found == reason
    assert bool(cot) == (reason == "accepted")


def test_a_reply_that_was_cut_off_or_never_came_is_not_kept(tmp_path):
    settings = settings_for(tmp_path, "http://x")
    text = "<think>red</think>\\boxed{Case 3}"
    assert judge(settings, EXAMPLE, Reply(text, False)) == ("", "cut_off")
    assert judge(settings, EXAMPLE, Reply("", False, "timeout")) == ("", "timeout")


@pytest.mark.parametrize(
    ("thought", "tells"),
    [
        ("Condition 1: any color red? red cube. True", False),
        ("The expected answer is Case 3, so it must be red", True),
        ("I was told Case 3. Red, cube.", True),
        ("Since the answer is given as Case 3", True),
        ("the hint says cube", True),
        ("a hint of red; the tool result is 3", False),
    ],
)
def test_a_reverse_thought_must_not_tell_of_the_hint(thought, tells, tmp_path):
    text = f"<think>{thought}</think>\\boxed{{Case 3}}"
    reverse = settings_for(tmp_path, "http://x", mode="reverse")
    assert judge(reverse, EXAMPLE, Reply(text, True))[1] == (
        "tells_the_hint" if tells else "accepted"
    )
    forward = settings_for(tmp_path, "http://x")
    assert judge(forward, EXAMPLE, Reply(text, True))[1] == "accepted"


def test_forward_thoughts_from_an_endpoint(tmp_path):
    by_image = write_source(tmp_path / "in")
    tries = {}

    def answer(messages, images):
        example = by_image[images[0]]
        tree = read_policy(messages[0]["content"])  # the policy is the system message
        assert (messages[0]["role"], tree) == ("system", TREE.root)
        assert messages[1]["content"][-1]["text"] == example.query
        tries[example.example_id] = tries.get(example.example_id, 0) + 1
        number = list(by_image).index(images[0])
        # s0 right at once; s1 at the second try; s2 never; s3 after a failure that is retried
        if number == 1 and tries[example.example_id] == 1:
            return completion_text("guess", "Case 99")
        if number == 2:
            return completion_text("guess", "Case 98")
        if number == 3 and tries[example.example_id] == 1:
            return 503
        return completion_text(example.meta["gold_cot"], example.answer)

    with serving(answer) as (url, asked):
        facts = run(settings_for(tmp_path, url, instruction=""))
    assert len(asked) == 1 + 2 + 3 + 2
    assert (facts["asked"], facts["accepted"], facts["attempts_made"]) == (4, 3, 7)
    assert facts["acceptance_rate"] == 0.75
    assert facts["rejected"] == {"wrong_answer": 4}
    assert facts["by_policy"] == {TREE.name: [3, 4]}
    manifest = check_dataset(tmp_path / "out")
    assert manifest["recipe"]["cot"] == facts
    assert {name: split["count"] for name, split in manifest["splits"].items()} == {
        "train": 4,
        "cot": 3,
        "test": 1,
    }
    for split in ("train", "test"):
        assert read_split(tmp_path / "out", split) == read_split(tmp_path / "in", split)
    cot = read_split(tmp_path / "out", "cot")
    assert [e.meta["scene_id"] for e in cot] == ["s0", "s1", "s3"]
    assert all(e.cot == e.meta["gold_cot"] != "" for e in cot)
    assert [e.meta["cot_source"]["attempt"] for e in cot] == [0, 1, 0]
    assert not list(tmp_path.glob(".*"))


def test_reverse_thoughts_see_the_answer_and_pictures_of_the_policy_travel(tmp_path):
    by_image = write_source(tmp_path / "in", crops=(CROP,), per_policy=2)
    tries = []

    def answer(messages, images):
        assert len(messages) == 1 and images[0] == CROP.png  # policy with pictures: user message
        example = by_image[images[1]]
        said = messages[0]["content"][-1]["text"]
        assert f"\\boxed{{{example.answer}}}" in said and "Be brief." in said
        tries.append(1)
        told = "The given answer fits." if len(tries) == 1 else example.meta["gold_cot"]
        return completion_text(told, example.answer)

    with serving(answer) as (url, _):
        facts = run(
            settings_for(tmp_path, url, mode="reverse", examples=2, instruction="Be brief.")
        )
    assert facts["rejected"] == {"tells_the_hint": 1}
    assert (facts["mode"], facts["accepted"], facts["attempts_made"]) == ("reverse", 2, 3)
    # the hint is the generator's, never the trained model's
    for example in read_split(tmp_path / "out", "cot"):
        assert "right answer" not in example.query and "Be brief" not in example.query


def test_a_killed_run_goes_on_with_the_replies_it_has(tmp_path):
    by_image = write_source(tmp_path / "in")
    good = lambda messages, images: completion_text("seen", by_image[images[0]].answer)  # noqa: E731
    calls = []

    def breaks(messages, images):
        calls.append(1)
        return good(messages, images) if len(calls) < 3 else 401

    with (
        serving(breaks) as (url, _),
        pytest.raises(ValueError, match="401"),
    ):
        run(settings_for(tmp_path, url))
    journal = tmp_path / ".out.cot.jsonl"
    with journal.open("a") as file:
        file.write('{"id": "cut of')  # a line that the kill cut
    with serving(good) as (url, asked):  # another port, the same questions
        facts = run(settings_for(tmp_path, url))
    assert len(asked) == 2  # two were answered before
    assert (facts["accepted"], facts["attempts_made"]) == (4, 4)
    assert not journal.exists()


def test_other_settings_do_not_take_over_a_journal(tmp_path):
    write_source(tmp_path / "in")
    with serving(lambda *_: 401) as (url, _):
        with pytest.raises(ValueError, match="401"):
            run(settings_for(tmp_path, url))
        with pytest.raises(ValueError, match="replies to other questions"):
            run(settings_for(tmp_path, url, temperature=0.5))


def test_nothing_is_written_when_nothing_is_right(tmp_path):
    write_source(tmp_path / "in")
    with (
        serving(lambda *_: completion_text("guess", "Case 77")) as (url, _),
        pytest.raises(ValueError, match=r"none of 4 examples .*wrong_answer': 12"),
    ):
        run(settings_for(tmp_path, url))
    assert not (tmp_path / "out").exists()


def test_no_server_and_refused_requests_are_told(tmp_path, monkeypatch):
    write_source(tmp_path / "in")
    with (
        serving(lambda *_: 400) as (url, _),
        pytest.raises(ValueError, match=r"none of 4 requests brought a text: \{'http_400': 4\}"),
    ):
        run(settings_for(tmp_path, url))
    (tmp_path / ".out.cot.jsonl").unlink()
    monkeypatch.setattr("trimpi_jax.io.chat_endpoint.MAX_RETRIES", 0)
    with pytest.raises(ValueError, match="Is the server running"):
        run(settings_for(tmp_path, url))  # it is closed by now


def test_an_actor_of_ours_thinks_with_the_policy_in_its_prompt(tmp_path, monkeypatch):
    write_source(tmp_path / "in", per_policy=8)
    seen = []
    encode = make_cot.encode_prompt

    def spy(example, processor, *, policy_in_prompt):
        seen.append((example.query, policy_in_prompt))
        return encode(example, processor, policy_in_prompt=policy_in_prompt)

    monkeypatch.setattr(make_cot, "encode_prompt", spy)
    settings = CotSettings(
        data=str(tmp_path / "in"),
        out=str(tmp_path / "out"),
        model="assets/nano",
        examples=8,
        attempts=3,
        max_new_tokens=96,
        rows=8,
        instruction="Look.",
    )
    facts = run(settings)
    assert all(aware and query.endswith("\nLook.") for query, aware in seen)
    cot = read_split(tmp_path / "out", "cot")
    # 24 tries at a question with four answers: one is right even by chance
    assert 0 < len(cot) == facts["accepted"] <= facts["attempts_made"] <= 24
    assert (facts["generator"], facts["model"]) == ("actor", "nano")
    for example in cot:
        said = Reply(completion_text(example.cot, example.answer), True)
        assert judge(settings, example, said) == (example.cot, "accepted")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sideways"}, "mode must be one of"),
        ({"temperature": 0.0}, "attempts must be 1"),
        ({"rows": 4}, "no effect with an endpoint"),
        ({"base_url": "", "timeout_s": 5.0, "concurrency": 8}, "no effect with an actor"),
        ({"min_accuracy": 0.0}, "min_accuracy"),
        ({"attempts": 0}, "must be >= 1"),
    ],
)
def test_wrong_settings_are_errors(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_for(tmp_path, "http://x", **changes)


def test_the_door_tells_what_is_wrong(tmp_path, capsys):
    write_source(tmp_path / "in")
    common = ["--data", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([*common, "--modell", "x"], "did you mean --model?"),
        ([*common, "--model", "nowhere", "--examples", "4"], "is --base-url missing?"),
        ([*common, "--model", "assets/nano"], "say how many with --examples"),
        ([*common, "--model", "assets/nano", "--examples", "9"], "has 4 training examples, not 9"),
        (["--data", "/none", "--out", "x", "--model", "y"], "/none"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
