"""What a policy in the prompt costs: prompt tokens and prefill time, with it and without it.

Source: paper section 5 (efficiency).
Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from data_pipelines.example import Example
from trimpi_jax.inputs.batching import make_batch
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import Processor

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
) -> float:
    """Median milliseconds of the prefill of one prompt at its exact length, after warm-up."""
    row = encode_prompt(example, processor, policy_in_prompt=policy_in_prompt)
    batch = make_batch(
        [row], num_rows=1, num_tokens=len(row.tokens), num_windows=len(row.images.patches)
    )
    batch = jax.device_put(batch)
    times = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(prefill(params, batch))
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP:])
