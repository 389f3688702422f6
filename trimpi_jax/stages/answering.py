"""One question, one answer: a model held open, asked with or without a policy in the prompt.

In: the folder of a model. Out: `Answer`, its text with prompt tokens and milliseconds.

The programs of a prompt's size are compiled when it is first met; times are of a run after that, so
they are what a server would see.

Next: trimpi_jax/stages/demo.py
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.example import Example, decode_image
from data_pipelines.shards import MANIFEST
from data_pipelines.streaming import iter_split
from trimpi_jax.grading.answers import find_boxes
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models.processor import Processor, decode_completion
from trimpi_jax.ops.kernels import choose_implementation
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import (
    Engine,
    Weights,
    answer,
    encode_questions,
    encode_visual,
    fetch,
    make_engine,
    make_free_view,
    read_prompts,
)
from trimpi_jax.rollouts.groups import PromptSizes, plain_view
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.open_model import ModelSource, find_model, load_model, open_config

TOKENS_STEP = 64  # prompts are padded to a multiple of this: few programs, little padding


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost."""

    text: str
    boxed: str  # the last boxed answer; "" = there is none
    prompt_tokens: int
    completion_tokens: int
    prefill_ms: float  # images and prompt
    decode_ms: float
    stopped: bool  # False = cut off at the length limit


@dataclasses.dataclass
class OpenModel:
    """A model ready to be asked."""

    source: ModelSource
    processor: Processor
    engine: Engine
    weights: Weights
    dtype: str
    max_positions: int
    met: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)  # sizes that are compiled

    def ask(
        self,
        example: Example,
        *,
        policy_in_prompt: bool,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """Answer one question.

        Args:
            example: query, images, and the policy if it is to be in the prompt.
            policy_in_prompt: whether the policy document is the system message.
            max_new_tokens: limit of the completion.
            temperature: 0 = greedy.
            seed: of the sampling.

        Raises:
            ValueError: no query, an unreadable image, or a prompt longer than the model's reach.
        """
        check_question(example)
        row = encode_prompt(example, self.processor, policy_in_prompt=policy_in_prompt)
        length = len(row.tokens)
        if length + max_new_tokens > self.max_positions:
            raise ValueError(
                f"prompt of {length} tokens and {max_new_tokens} new ones exceed the"
                f" {self.max_positions} positions of the model; use a smaller image or policy"
            )
        windows = max(len(row.images.patches), 1)
        tokens = -(-length // TOKENS_STEP) * TOKENS_STEP
        settings = SamplerSettings(1, max_new_tokens, temperature=temperature, dtype=self.dtype)
        engine = dataclasses.replace(self.engine, sizes=PromptSizes((tokens,), (windows,)))
        run = functools.partial(
            self._run, engine, example, policy_in_prompt, settings, jax.random.key(seed)
        )
        with jax.set_mesh(engine.mesh):
            if (size := (tokens, windows, settings)) not in self.met:
                run()  # compiles
                self.met.add(size)
            rollouts, prefill_ms, decode_ms = run()
        count = int(rollouts.lengths[0, 0])
        text = decode_completion(self.processor, rollouts.tokens[0, 0, :count])
        boxes = find_boxes(text)
        return Answer(
            text=text,
            boxed=boxes[-1][1] if boxes else "",
            prompt_tokens=length,
            completion_tokens=count,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            stopped=bool(rollouts.stopped[0, 0]),
        )

    def _run(self, engine, example, aware, settings, key) -> tuple[Any, float, float]:
        questions = encode_questions(engine, [example], aware=aware, share=False)
        rows = questions.aware if aware else questions.free
        view = plain_view(rows, engine.sizes, 1) if aware else make_free_view(engine, questions, 1)
        started = time.perf_counter()
        visual = encode_visual(engine, self.weights, view)
        asked = read_prompts(engine, self.weights, view, visual, settings, key, [example])
        jax.block_until_ready(asked.last)
        read = time.perf_counter()
        rollouts = fetch(engine, view, answer(self.weights, asked))
        done = time.perf_counter()
        return rollouts, 1000 * (read - started), 1000 * (done - read)


def open_model(given: Path, *, dtype: str = "float32") -> OpenModel:
    """Open the model of a run, stage, checkpoint or Hugging Face folder.

    Raises:
        ValueError, OSError: no model, no tokenizer, broken weights: before weights are read.
    """
    source = find_model(given)
    config = source.run_config() or ConfigDict()
    model, processor = open_config(source, config)
    attention = choose_implementation("auto", jax.default_backend(), dtype, model.text.head_width)
    model = dataclasses.replace(
        model, layer_loop=config.get("layer_loop", model.layer_loop), attention=attention
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        engine = make_engine(model, processor, PromptSizes((1,), (1,)), mesh, dtype=dtype)
        weights = engine.load(load_model(source, model, mesh))
    return OpenModel(source, processor, engine, weights, dtype, model.text.max_positions)


def make_question(
    query: str, images: Sequence[bytes], policy_text: str = "", policy_images: Sequence[bytes] = ()
) -> Example:
    """A question that comes from nowhere but the user."""
    return Example(
        "question",
        tuple(images),
        query,
        "",
        policy_text=policy_text,
        policy_images=tuple(policy_images),
    )


def check_question(example: Example) -> None:
    """Raises ValueError for an empty query or an image that cannot be read."""
    if not example.query.strip():
        raise ValueError("the prompt is empty; ask something")
    for number, image in enumerate(example.images, start=1):
        decode_image(image, f"image {number}")


def policies_of_run(source: ModelSource) -> dict[str, Example]:
    """Name -> an Example of it, for the policies that a run's test split asks about."""
    data = source.run / "data" if source.run else None
    if data is None or not (data / MANIFEST).is_file():
        return {}
    found: dict[str, Example] = {}
    for example in iter_split(data, "test"):
        if example.policy_text:
            found.setdefault(example.policy_name or "policy", example)
    return found
