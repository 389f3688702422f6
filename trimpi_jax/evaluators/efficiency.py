"""What a policy in the prompt costs: prompt tokens, prefill time, requests and tokens a second.

    internalized    no policy in the prompt
    in context      every prompt carries its policy and is read whole
    policy cached   the policy is read once and its keys and values are kept: the best case of in
                    context, as a server with a prefix cache has it

All at the same batch, greedy, on the same questions, from encoded prompts to new tokens on the
host. The policy repeated 2 and 4 times gives the cost of a policy token, and with the training time
the length of policy and the number of requests from which internalizing pays:

    seconds a request = a + b * policy tokens;   pays when requests * b * tokens > training seconds

Source: paper section 5 (efficiency); throughput and break-even are ours.
Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.example import Example
from trimpi_jax.evaluators.questions import Evaluator
from trimpi_jax.inputs.batching import make_batch
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import Processor
from trimpi_jax.rollouts.engine import (
    answer,
    encode_questions,
    encode_visual,
    fetch,
    make_aware_view,
    make_free_view,
    prompt_lengths,
    read_prompts,
)
from trimpi_jax.sharding import place_whole

WARM_UP = 2
REPEATS = 15


def make_prefill(config: VLMConfig, dtype: str) -> Callable[..., Any]:
    """A jitted prefill of one prompt, images included."""

    def prefill(params, batch):
        visual = vlm.encode_images(
            params, config, batch.patches, batch.patch_hw, batch.patch_segment, dtype=dtype
        )
        return vlm.prefill(
            params,
            config,
            batch.tokens,
            batch.positions,
            batch.lengths,
            visual,
            batch.visual_index,
            dtype=dtype,
        )

    return jax.jit(prefill)


def measure_prefill_ms(
    prefill: Callable[..., Any],
    params: Any,
    example: Example,
    processor: Processor,
    *,
    policy_in_prompt: bool,
    mesh: jax.sharding.Mesh,
) -> float:
    """Median milliseconds of the prefill of one prompt at its exact length, after warm-up."""
    row = encode_prompt(example, processor, policy_in_prompt=policy_in_prompt)
    batch = make_batch(
        [row], num_rows=1, num_tokens=len(row.tokens), num_windows=len(row.images.patches)
    )
    batch = place_whole(batch, mesh)
    times = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(prefill(params, batch))
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP:])


RUNS = 3  # timed, after one that compiles
POLICY_FACTORS = (1, 2, 4)  # the policy, repeated
PLANNED_REQUESTS = (10_000, 100_000, 1_000_000)


def measure_throughput(
    evaluator: Evaluator, examples: Sequence[Example], *, aware: bool, share: bool = False
) -> dict[str, float]:
    """Seconds a batch (median of RUNS), requests and new tokens a second.

    Args:
        evaluator: with weights; its buckets hold the prompts.
        examples: one batch, at most `evaluator.settings.rows`.
        aware: whether the policy is in the prompts.
        share: whether the policy's keys and values are read once and kept.

    Raises:
        ValueError: not every prompt fits.
    """
    engine, weights, rows = evaluator.engine, evaluator.weights, evaluator.settings.rows
    assert weights is not None, "load weights first"
    questions = encode_questions(engine, examples, aware=aware, share=share)
    if questions.dropped:
        raise ValueError(f"{len(questions.dropped)} prompts fit no bucket")

    def run() -> Any:
        view = free = make_free_view(engine, questions, rows)
        if aware:
            view = make_aware_view(engine, questions, rows, rows)
        visual = encode_visual(engine, weights, free) if view is free or view.policies else None
        key = jax.random.key(0)  # greedy: not looked at
        asked = read_prompts(
            engine, weights, view, visual, evaluator.sampler, key, questions.examples
        )
        return fetch(engine, view, answer(weights, asked))

    rollouts = run()  # compiles
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        rollouts = run()
        times.append(time.perf_counter() - started)
    seconds, count = statistics.median(times), len(questions.examples)
    lengths = prompt_lengths(questions, aware=aware)
    new_tokens = float(np.sum(rollouts.lengths))
    return {
        "batch": count,
        "batch_s": seconds,
        "requests_per_s": count / seconds,
        "new_tokens_per_s": new_tokens / seconds,
        "new_tokens": new_tokens / count,
        "prompt_tokens": sum(lengths) / count,
    }


def repeat_policy(example: Example, factor: int) -> Example:
    """The Example with its policy document said `factor` times."""
    return dataclasses.replace(
        example,
        policy_text="\n".join([example.policy_text] * factor),
        policy_images=example.policy_images * factor,
    )


def fit_policy_cost(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * policy tokens, least squares.

    Args:
        points: (policy tokens, seconds a request), at least two different lengths.
    """
    tokens, seconds = np.asarray(points, np.float64).T
    slope, start = np.polyfit(tokens, seconds, 1)
    return float(start), float(slope)


def find_break_even(
    slope_s: float, train_s: float, policy_tokens: float
) -> dict[str, float | dict[str, float | None] | None]:
    """From when on internalizing saves more machine time than the training took.

    Args:
        slope_s: seconds a request and policy token.
        train_s: training time.
        policy_tokens: of the present policy.

    Returns:
        `requests` for the present policy; `policy_tokens` for each of PLANNED_REQUESTS. None =
        never: a policy token costs nothing that could be measured.
    """
    if slope_s <= 0:
        return {"requests": None, "policy_tokens": {str(n): None for n in PLANNED_REQUESTS}}
    return {
        "requests": train_s / (slope_s * policy_tokens),
        "policy_tokens": {str(n): train_s / (slope_s * n) for n in PLANNED_REQUESTS},
    }


def describe_efficiency(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines for the terminal."""
    lines = []
    for name in ("internalized", "in_context", "policy_cached"):
        found = summary[name]
        lines.append(
            (
                name.replace("_", " "),
                f"{found['requests_per_s']:.1f} requests/s, {found['new_tokens_per_s']:.0f} new"
                f" tokens/s, {found['prompt_tokens']:.0f} prompt tokens, batch {found['batch']}",
            )
        )
    lines.append(("a policy token costs a request", f"{1e6 * summary['slope_s']:.2f} µs"))
    if found := summary.get("break_even"):
        lines.append(("training time", f"{summary['train_s']:.0f} s"))
        if found["requests"] is None:
            lines.append(("pays", "never: no cost of policy tokens could be measured"))
        else:
            lines.append(("pays with this policy from", f"{found['requests']:,.0f} requests"))
            for count, tokens in found["policy_tokens"].items():
                lines.append((f"pays at {int(count):,} requests from", f"{tokens:,.0f} tokens"))
    return lines
