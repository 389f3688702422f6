"""Throughput on a tiny model, and when internalizing pays, by hand."""

import jax
import pytest

from tests.tiny_model import load_tiny_processor, make_question, tiny_config, tiny_params
from trimpi_jax.evaluators.efficiency import (
    describe_efficiency,
    find_break_even,
    fit_policy_cost,
    measure_throughput,
    repeat_policy,
)
from trimpi_jax.evaluators.questions import EvaluationSettings, Evaluator
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh

NEW_TOKENS = 4


def test_cost_of_a_policy_token_by_hand():
    # 10 ms, and 2 ms for every 100 tokens
    start, slope = fit_policy_cost([(0, 0.010), (100, 0.012), (200, 0.014), (400, 0.018)])
    assert start == pytest.approx(0.010) and slope == pytest.approx(2e-5)


def test_break_even_by_hand():
    # 20 microseconds a token: 100 tokens save 2 ms a request, 600 s of training are 300,000 of them
    found = find_break_even(2e-5, 600.0, 100.0)
    assert found["requests"] == pytest.approx(300_000)
    # 600 s / (1,000,000 requests * 20 microseconds) = 30 tokens
    assert found["policy_tokens"]["1000000"] == pytest.approx(30)
    assert find_break_even(-1e-6, 600.0, 100.0)["requests"] is None


def test_throughput_counts_what_was_asked():
    examples = [make_question(number) for number in range(2)]
    mesh = make_mesh(devices=jax.devices()[:1])
    config, processor = tiny_config(), load_tiny_processor()
    with jax.set_mesh(mesh):
        engine = make_engine(config, processor, PromptSizes((1,), (1,)), mesh, dtype="float32")
        evaluator = Evaluator(engine, EvaluationSettings(rows=2, max_new_tokens=NEW_TOKENS))
        evaluator.load(tiny_params(config))
        with pytest.raises(ValueError, match="2 prompts fit no bucket"):
            measure_throughput(evaluator, examples, aware=False)
        evaluator = evaluator.changed(examples)
        found = {
            "internalized": measure_throughput(evaluator, examples, aware=False),
            "in_context": measure_throughput(evaluator, examples, aware=True),
            "policy_cached": measure_throughput(evaluator, examples, aware=True, share=True),
        }
    for name, aware in (("internalized", False), ("in_context", True), ("policy_cached", True)):
        lengths = [
            len(encode_prompt(e, processor, policy_in_prompt=aware).tokens) for e in examples
        ]
        one = found[name]
        assert one["prompt_tokens"] == sum(lengths) / 2
        assert one["requests_per_s"] == pytest.approx(2 / one["batch_s"])
        assert one["new_tokens_per_s"] == pytest.approx(2 * one["new_tokens"] / one["batch_s"])
        assert 0 < one["new_tokens"] <= NEW_TOKENS
    lines = describe_efficiency(found | {"slope_s": 2e-6})
    assert [what for what, _ in lines][-1] == "a policy token costs a request"
    assert lines[-1][1] == "2.00 µs"


def test_a_longer_policy_is_the_policy_again():
    question = make_question(0)
    assert repeat_policy(question, 2).policy_text.count(question.policy_text) == 2
