"""Train the nano base from nothing: captions, existence questions, policies in context.

Not a stage of the paper (which starts from Qwen2.5-VL), but what makes its method runnable where no
pretrained model can be had.

Next: data_pipelines/nano_base/mixture.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.building import write_dataset
from data_pipelines.example import Example, decode_record
from data_pipelines.nano_base.corpus import iter_corpus
from data_pipelines.nano_base.mixture import (
    Phase,
    make_caption,
    make_existence,
    make_policy_question,
    phase_of_step,
    task_of_step,
)
from data_pipelines.nano_base.scenes import SceneSetSettings, make_scene_examples, scene_objects
from data_pipelines.shards import check_dataset, split_files
from trimpi_jax.inputs.batching import choose_bucket, drop_too_long, make_batch
from trimpi_jax.inputs.encode import EncodedRow, encode_example, encode_with_completion
from trimpi_jax.io.progress import Progress
from trimpi_jax.models import vlm
from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig
from trimpi_jax.models.hf_weights import load_hf, save_hf
from trimpi_jax.models.nano_tokenizer import (
    SPECIAL_TOKENS,
    make_tokenizer,
    write_preprocessor_config,
)
from trimpi_jax.models.processor import Processor, copy_processor_files, load_processor
from trimpi_jax.stages import loop
from trimpi_jax.stages.supervised import StepSettings, make_supervised_step
from trimpi_jax.stages.train_state import OptimizerSettings, init_train_state, make_optimizer
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
        scene = decode_record(scenes[int(rng.integers(len(scenes)))])
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
            scene = decode_record(scenes[int(rng.integers(len(scenes)))])
        example = make_policy_question(rng, scene, phase.depths)
        return encode_example(
            example, processor, policy_in_prompt=True, with_cot=True, loss_on="completion"
        )
    example = make_caption(rng, scene) if task == "caption" else make_existence(rng, scene)
    return encode_plain(example, processor)


def encode_plain(example: Example, processor: Processor) -> EncodedRow:
    """A question without policy whose answer is said as it is, without a box."""
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


def run_nano_base(config: Any, workdir: Path, progress: Progress) -> Path:
    """The whole run: scenes, tokenizer, training, export. Returns the model folder.

    Args:
        config: see configs/nano_base.py.
        workdir: gets data/, tokenizer/, nano_base/ (checkpoints, metrics) and final/.
        progress: where bars and lines go.
    """
    scenes = _prepare_scenes(config, workdir / "data", progress)
    tokenizer_folder = workdir / "tokenizer"
    model_config = make_model_config(config)
    _prepare_tokenizer(config, tokenizer_folder, progress)
    processor = load_processor(tokenizer_folder, model_config)
    settings = MixtureSettings(
        num_steps=config.train.steps,
        seed=config.seed,
        phases=tuple(
            Phase(p.until, tuple(p.shares), tuple(p.depths), p.max_objects)
            for p in config.train.phases
        ),
        rows=config.train.rows,
        policy_rows=config.train.policy_rows,
        token_buckets=tuple(config.train.token_buckets),
        windows=config.train.windows,
    )
    optimizer = make_optimizer(
        OptimizerSettings(
            learning_rate=config.train.learning_rate,
            steps=config.train.steps,
            warmup_steps=config.train.warmup_steps,
            schedule="cosine",
            b2=config.train.b2,
            weight_decay=config.train.weight_decay,
        )
    )
    if config.init_dir:
        saved_config, params = load_hf(config.init_dir)
        if saved_config.to_hf() != model_config.to_hf():
            raise ValueError(f"{config.init_dir} is another architecture than config.model")
        params = jax.tree.map(jnp.asarray, params)
    else:
        init = jax.jit(lambda key: vlm.init_params(model_config, key))
        params = init(jax.random.key(config.seed))
    state = init_train_state(params, optimizer, "all")
    step = make_supervised_step(model_config, optimizer, StepSettings("all", config.dtype))
    stream = _MixtureStream(scenes, processor, settings)

    def take_step(state, number, element):
        task, batch, dropped = element
        state, metrics = step(state, batch)
        return state, metrics | {"train/task": task, "inputs/dropped_too_long": dropped}

    state = loop.run(
        loop.LoopSettings(
            name="nano_base",
            folder=workdir / "nano_base",
            num_steps=config.train.steps,
            save_every=config.train.save_every,
            log_every=config.train.log_every,
        ),
        state,
        loop.Source(stream.fetch, dict, lambda place: None),
        take_step,
        progress,
    )
    final = workdir / "final"
    save_hf(final, model_config, jax.device_get(state.params))
    copy_processor_files(tokenizer_folder, final)
    progress.say(f"nano_base: {final} is the trained base, in Hugging Face layout")
    return final


def make_model_config(config: Any) -> VLMConfig:
    """The nano architecture from config.model."""
    model = config.model
    ids = {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    return VLMConfig(
        vision=VisionConfig(
            depth=model.vision_depth,
            width=model.vision_width,
            heads=model.vision_heads,
            mlp_width=model.vision_mlp_width,
            out_width=model.width,
            window_size=model.window_size,
            full_attention_blocks=tuple(model.full_attention_blocks),
        ),
        text=TextConfig(
            vocab_size=model.vocab_size,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_width=model.head_width,
            mlp_width=model.mlp_width,
            rope_theta=model.rope_theta,
            mrope_section=tuple(model.mrope_section),
            max_positions=4096,
            tied=True,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        pad_token_id=ids["<|endoftext|>"],
        layer_loop="unrolled",
    )


class _MixtureStream:
    """Batches by step number; made ahead of time from whichever step is asked for first."""

    def __init__(self, folder: Path, processor: Processor, settings: MixtureSettings):
        self._make = lambda step: make_mixture_stream(str(folder), processor, settings, step)
        self._iterator = None

    def fetch(self, step: int):
        if self._iterator is None:
            self._iterator = self._make(step)
        return next(self._iterator)


def _prepare_scenes(config: Any, folder: Path, progress: Progress) -> Path:
    settings = SceneSetSettings(
        count=config.scenes.count,
        width=config.scenes.width,
        height=config.scenes.height,
        min_objects=config.scenes.min_objects,
        max_objects=config.scenes.max_objects,
        seed=config.seed,
    )
    recipe = {"dataset": "nano_base_scenes", **dataclasses.asdict(settings)}
    if folder.exists():
        if check_dataset(folder)["recipe"] != recipe:
            raise ValueError(f"{folder} was made with other settings; choose another workdir")
        return folder
    with progress.task("scenes", settings.count) as bar:
        examples = make_scene_examples(settings, lambda done, total: bar(done, {}))
        write_dataset(folder, {"train": examples}, recipe)
    return folder


def _prepare_tokenizer(config: Any, folder: Path, progress: Progress) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    progress.say("nano_base: training the tokenizer")
    write_preprocessor_config(
        folder,
        patch_size=14,
        merge_size=2,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
    )
    documents = iter_corpus(config.seed, config.model.tokenizer_documents)
    make_tokenizer(folder, documents, vocab_size=config.model.vocab_size)
