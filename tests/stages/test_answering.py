"""One question, one answer: the door, the numbers beside the answer, and what is refused."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.example import encode_png
from tests.tiny_model import ASSETS, load_tiny_processor, make_question, tiny_config, tiny_params
from trimpi_jax import sample
from trimpi_jax.evaluators.questions import EvaluationSettings, Evaluator
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages import demo
from trimpi_jax.stages.answering import OpenModel
from trimpi_jax.stages.open_model import ModelSource

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def opened():
    """A tiny random model, held open."""
    mesh = make_mesh(devices=jax.devices()[:1])
    config, processor = tiny_config(), load_tiny_processor()
    with jax.set_mesh(mesh):
        engine = make_engine(config, processor, PromptSizes((1,), (1,)), mesh, dtype="float32")
        weights = engine.load(tiny_params(config))
    source = ModelSource(ASSETS, ASSETS, None, None)
    return OpenModel(source, processor, engine, weights, "float32", config.text.max_positions)


def test_answers_are_those_of_the_evaluator(opened):
    question = make_question(1)
    with jax.set_mesh(opened.engine.mesh):
        engine = make_engine(
            opened.engine.config,
            opened.processor,
            PromptSizes((256,), (4,)),
            opened.engine.mesh,
            dtype="float32",
        )
        evaluator = Evaluator(engine, EvaluationSettings(rows=1, max_new_tokens=NEW_TOKENS))
        evaluator.load(tiny_params(opened.engine.config))
        for aware in (False, True):
            wanted = evaluator.ask([question], policy_in_prompt=aware)[0]
            found = opened.ask(question, policy_in_prompt=aware, max_new_tokens=NEW_TOKENS)
            assert found.text == wanted["completion"]
            assert found.prompt_tokens == wanted["prompt_tokens"]
            assert 0 < found.completion_tokens <= NEW_TOKENS
            assert found.prefill_ms > 0 and found.decode_ms > 0


def test_the_page_asks_both(opened):
    question = make_question(1)
    image = Image.open(io.BytesIO(question.images[0]))
    said = demo.answer_both(
        (opened, opened), image, question.query, question.policy_text, question, NEW_TOKENS
    )
    free = opened.ask(question, policy_in_prompt=False, max_new_tokens=NEW_TOKENS)
    aware = opened.ask(question, policy_in_prompt=True, max_new_tokens=NEW_TOKENS)
    assert (said[0], said[2]) == (free.text, aware.text)
    assert said[1].startswith(f"{free.prompt_tokens} prompt tokens, ")
    assert said[3].startswith(f"{aware.prompt_tokens} prompt tokens, ")
    assert aware.prompt_tokens > free.prompt_tokens
    with pytest.raises(ValueError, match="policy is empty"):
        demo.answer_both((opened, opened), image, "a?", " ", None, NEW_TOKENS)


def test_the_page_stays_on_this_machine(opened, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="extra demo is not installed")
    monkeypatch.setattr(demo, "open_pair", lambda *given: (opened, opened))
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options))
    demo.serve(ASSETS, None, policy="# Rule", max_new_tokens=4, dtype="float32", port=7999)
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"trimpi_jax\[demo\]"):
        demo.serve(ASSETS, None, policy="", max_new_tokens=4, dtype="float32", port=7999)


def test_the_door_answers_in_words_and_json(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trimpi_jax.stages.answering.open_model", lambda *_, **__: opened)
    picture = tmp_path / "a.png"
    picture.write_bytes(make_question(1).images[0])
    options = ["--model", "x", "--image", str(picture), "--max-new-tokens", str(NEW_TOKENS)]
    sample.main([*options, "--prompt", make_question(1).query])
    words = capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(make_question(1).query + "\n"))
    sample.main([*options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == words.out.rstrip("\n") or found["text"] + "\n" == words.out
    assert f"{found['prompt_tokens']} prompt tokens" in words.err
    policy = tmp_path / "policy.md"
    policy.write_text(make_question(1).policy_text)
    sample.main([*options, "--json", "--prompt", "Which?", "--policy", str(policy)])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > found["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--image", "none.png"], "none.png"),
        (["--prompt", "a", "--image", "text.png"], "no readable image"),
        (["--prompt", "a", "--policy", "empty.md"], "is empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "a", "--seed", "3"], "without effect at temperature 0"),
        (["--prompt", "a", "--base", "b"], "unless --ui"),
        (["--ui", "--prompt", "a", "--json"], "--prompt, --json: without effect with --ui"),
        (["--prompt", "a", "--model", "none"], "none is not a folder"),
        (["--prompt", "a", "--model", "untold"], "lacks"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "untold").mkdir()  # a model without a tokenizer
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "untold" / name).symlink_to(ASSETS / name)
    with pytest.raises(SystemExit, match=message):
        sample.main(["--model", str(ASSETS), *options])


def test_too_long_a_prompt_is_refused(opened):
    with pytest.raises(ValueError, match="exceed the 4096 positions"):
        opened.ask(make_question(1), policy_in_prompt=False, max_new_tokens=5000)


def test_what_is_no_photo_is_refused(opened):
    flat = encode_png(np.zeros((28, 28, 3), np.uint8))
    broken = make_question(1, images=(flat, flat[:40]))
    with pytest.raises(ValueError, match="image 2"):
        opened.ask(broken, policy_in_prompt=False, max_new_tokens=4)
