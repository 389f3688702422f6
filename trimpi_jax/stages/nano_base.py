"""Train the nano base from nothing: captions, existence questions, policies in context.

Not a stage of the paper (which starts from Qwen2.5-VL), but what makes its method runnable where no
pretrained model can be had.

Next: data_pipelines/nano_base/mixture.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from data_pipelines.example import Example, decode_example
from data_pipelines.nano_base.mixture import (
    Phase,
    make_caption,
    make_existence,
    make_policy_question,
    phase_of_step,
    task_of_step,
)
from data_pipelines.nano_base.scenes import scene_objects
from data_pipelines.shards import split_files
from trimpi_jax.inputs.batching import choose_bucket, drop_too_long, make_batch
from trimpi_jax.inputs.encode import EncodedRow, encode_example
from trimpi_jax.models.processor import Processor
from trimpi_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class MixtureSettings:
    """Batch shapes of the mixture: rows and token buckets."""

    num_steps: int
    seed: int
    phases: tuple[Phase, ...]
    rows: int
    policy_rows: int
    token_buckets: tuple[int, ...]
    windows: int


class _MakeBatch(grain.transforms.Map):
    """Step number -> Batch. A pure function of the settings and the step."""

    def __init__(self, folder: str, processor: Processor, settings: MixtureSettings):
        self.scenes = grain.sources.ArrayRecordDataSource(split_files(folder, "train"))
        self.processor = processor
        self.settings = settings

    def map(self, element: int) -> tuple[str, Batch, int]:
        return mixture_batch(int(element), self.scenes, self.processor, self.settings)


def mixture_batch(
    step: int, scenes, processor: Processor, settings: MixtureSettings
) -> tuple[str, Batch, int]:
    """(task, batch, rows dropped as too long) of a step."""
    task = task_of_step(step, settings.num_steps, settings.phases, settings.seed)
    phase = phase_of_step(step, settings.num_steps, settings.phases)
    num_rows = settings.policy_rows if task == "policy" else settings.rows
    rows: list[EncodedRow] = []
    for i in range(num_rows):
        rng = np.random.default_rng([settings.seed, 12, step, i])
        scene = decode_example(scenes[int(rng.integers(len(scenes)))])
        rows.append(_encode(task, rng, scene, phase, processor, scenes))
    fitted = drop_too_long(rows, max(settings.token_buckets), settings.windows)
    longest = max((len(row.tokens) for row in fitted.rows), default=1)
    batch = make_batch(
        fitted.rows,
        num_rows=num_rows,
        num_tokens=choose_bucket(longest, settings.token_buckets),
        num_windows=settings.windows,
    )
    return task, batch, fitted.too_long


def _encode(task, rng, scene: Example, phase: Phase, processor, scenes) -> EncodedRow:
    if task == "policy":
        while len(scene_objects(scene)) > phase.max_objects:
            scene = decode_example(scenes[int(rng.integers(len(scenes)))])
        example = make_policy_question(rng, scene, phase.depths)
        return encode_example(
            example, processor, policy_in_prompt=True, with_cot=True, loss_on="completion"
        )
    example = make_caption(rng, scene) if task == "caption" else make_existence(rng, scene)
    return encode_plain(example, processor)


def encode_plain(example: Example, processor: Processor) -> EncodedRow:
    """A question without policy whose answer is said as it is, without a box."""
    from trimpi_jax.inputs.encode import encode_with_completion

    return encode_with_completion(
        example, processor, example.answer, policy_in_prompt=False, loss_on="completion"
    )


def make_mixture_stream(
    folder: str, processor: Processor, settings: MixtureSettings, first_step: int
) -> grain.DatasetIterator:
    """(task, batch, dropped) from `first_step` on, made ahead of time in a thread."""
    steps: Sequence[int] = range(first_step, settings.num_steps)
    dataset = grain.MapDataset.source(steps).map(_MakeBatch(folder, processor, settings))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)))
