"""Train the nano base from nothing, in three legs.

    perception   the vision tower alone learns what is in every cell of a picture
    reading      the tower stands still; the language model learns captions, questions, policies
    joint        both together, for the last few percent

Not a stage of the paper (which starts from Qwen2.5-VL), but what makes its method runnable where no
pretrained model can be had.

Next: trimpi_jax/stages/nano_perception.py
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.building import write_dataset
from data_pipelines.clevr.renderer import LOOK
from data_pipelines.nano_base.corpus import WHOLE, iter_corpus
from data_pipelines.nano_base.mixture import Phase
from data_pipelines.nano_base.pictures import load_pictures, make_lone_examples
from data_pipelines.nano_base.scenes import SceneSetSettings, make_scene_examples
from data_pipelines.shards import check_dataset
from trimpi_jax.inputs.policy_trees import TreeShape
from trimpi_jax.io.progress import Progress
from trimpi_jax.models import vlm
from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig
from trimpi_jax.models.hf_weights import load_hf, save_hf
from trimpi_jax.models.nano_tokenizer import (
    SPECIAL_TOKENS,
    make_tokenizer,
    write_preprocessor_config,
)
from trimpi_jax.models.processor import copy_processor_files, load_processor
from trimpi_jax.stages import loop
from trimpi_jax.stages.nano_perception import (
    PerceptionSettings,
    encode_all,
    init_heads,
    make_patches,
    make_perception_step,
    perception_batch,
    rescale_visual,
)
from trimpi_jax.stages.nano_reading import (
    Mixture,
    PictureBank,
    ReadingSettings,
    make_reading_step,
    make_stream,
)
from trimpi_jax.stages.train_state import OptimizerSettings, init_train_state, make_optimizer


def run_nano_base(config: Any, workdir: Path, progress: Progress) -> Path:
    """The whole run: pictures, tokenizer, three legs, export. Returns the model folder.

    Args:
        config: see configs/nano_base.py. A leg of 0 steps is left out.
        workdir: gets data/, lone/, tokenizer/, a folder a leg (checkpoints, metrics) and final/.
        progress: where bars and lines go.

    Raises:
        ValueError: the workdir holds pictures or a tokenizer of other settings, or init_dir is of
            another architecture.
    """
    model_config = make_model_config(config)
    params = _initial_params(config, model_config)
    scene_folder = _prepare_scenes(config, workdir / "data", progress)
    lone_folder = _prepare_lone(config, workdir / "lone", progress)
    tokenizer_folder = workdir / "tokenizer"
    _prepare_tokenizer(config, tokenizer_folder, progress)
    processor = load_processor(tokenizer_folder, model_config)
    scenes, lone = load_pictures(scene_folder), load_pictures(lone_folder, lone=True)
    patches, lone_patches = make_patches(scenes, model_config), make_patches(lone, model_config)
    # from here on only their size matters
    scenes, lone = (dataclasses.replace(p, pixels=p.pixels[:1].copy()) for p in (scenes, lone))

    if config.perception.steps:
        section = config.perception
        settings = PerceptionSettings(section.scenes, section.lone, config.seed)
        optimizer = _optimizer(config, section)
        heads = init_heads(model_config, jax.random.key(config.seed + 1))
        trained = {"vision": params["vision"], "heads": heads}
        step = make_perception_step(model_config, optimizer, patches, lone_patches)
        trained, _ = _run_leg(
            config,
            workdir / "perception",
            section.steps,
            (trained, jax.jit(optimizer.init)(trained)),
            lambda number: perception_batch(
                number, settings, (patches, scenes.labels), (lone_patches, lone.labels)
            ),
            step,
            progress,
        )
        vision = rescale_visual(trained["vision"], model_config, patches, section.visual_rms)
        params = {**params, "vision": vision}

    for name in ("reading", "joint"):
        section = config[name]
        if not section.steps:
            continue
        banks = (patches, lone_patches)
        arrays = [bank.patches for bank in banks]
        if name == "reading":
            arrays = [encode_all(params["vision"], model_config, bank) for bank in banks]
        source = Mixture(
            _reading_settings(config, section),
            processor,
            PictureBank(scenes, arrays[0]),
            PictureBank(lone, arrays[1]),
        )
        optimizer = _optimizer(config, section)
        layouts = banks if name == "joint" else None
        step = make_reading_step(model_config, optimizer, layouts)
        state = init_train_state(params, optimizer, "all" if layouts else "all_but_vision")
        stream = _FromStep(lambda first, source=source: make_stream(source, first))
        state = _run_leg(
            config, workdir / name, section.steps, state, stream.fetch, _with_task(step), progress
        )
        params = state.params
    final = workdir / "final"
    save_hf(final, model_config, jax.device_get(params))
    copy_processor_files(tokenizer_folder, final)
    progress.say(f"nano_base: {final} is the trained base, in Hugging Face layout")
    return final


def _run_leg(config, folder: Path, steps: int, state, fetch, step, progress: Progress):
    return loop.run(
        loop.LoopSettings(
            name=folder.name,
            folder=folder,
            num_steps=steps,
            save_every=config.save_every,
            log_every=config.log_every,
        ),
        state,
        loop.Source(fetch, dict, lambda place: None),
        lambda state, number, batch: step(state, batch),
        progress,
    )


def _with_task(step: Callable) -> Callable:
    """A step of batches that say their task, which is logged."""

    def take_step(state, element):
        task, batch = element
        state, metrics = step(state, batch)
        return state, metrics | {"train/task": task}

    return take_step


def _initial_params(config: Any, model_config: VLMConfig) -> Any:
    if not config.init_dir:
        init = jax.jit(lambda key: vlm.init_params(model_config, key))
        return init(jax.random.key(config.seed))
    saved_config, params = load_hf(config.init_dir)
    if saved_config.to_hf() != model_config.to_hf():
        raise ValueError(f"{config.init_dir} is another architecture than config.model")
    return jax.tree.map(jnp.asarray, params)


def _optimizer(config: Any, section: Any):
    return make_optimizer(
        OptimizerSettings(
            learning_rate=section.learning_rate,
            steps=section.steps,
            warmup_steps=section.warmup_steps,
            schedule="cosine",
            b2=config.optimizer.b2,
            weight_decay=config.optimizer.weight_decay,
        )
    )


def _reading_settings(config: Any, section: Any) -> ReadingSettings:
    return ReadingSettings(
        num_steps=section.steps,
        seed=config.seed,
        phases=tuple(
            Phase(p.until, tuple(p.shares), tuple(p.depths), p.shown, p.shuffled)
            for p in section.phases
        ),
        shapes={name: TreeShape(*shape) for name, shape in config.shapes.items()},
        shown_share=config.lone.shown_share,
    )


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


class _FromStep:
    """Batches by step number, made ahead of time from whichever step is asked for first."""

    def __init__(self, make: Callable[[int], Any]):
        self._make = make
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
    recipe = {"dataset": "nano_base_scenes", "look": LOOK, **dataclasses.asdict(settings)}
    return _prepare(
        folder, recipe, "scenes", lambda bar: make_scene_examples(settings, bar), progress
    )


def _prepare_lone(config: Any, folder: Path, progress: Progress) -> Path:
    count, side = config.lone.count, config.lone.side
    recipe = {"dataset": "nano_base_lone", "look": LOOK, "count": count, "side": side}
    recipe |= {"seed": config.seed}
    return _prepare(
        folder,
        recipe,
        "lone objects",
        lambda bar: make_lone_examples(count, side, config.seed, bar),
        progress,
    )


def _prepare(folder: Path, recipe: dict, what: str, make: Callable, progress: Progress) -> Path:
    """The dataset in `folder`, made where it is absent."""
    if folder.exists():
        if check_dataset(folder)["recipe"] != recipe:
            raise ValueError(f"{folder} was made with other settings; choose another workdir")
        return folder
    with progress.task(what, recipe["count"]) as bar:
        write_dataset(folder, {"train": make(lambda done, total: bar(done, {}))}, recipe)
    return folder


def _prepare_tokenizer(config: Any, folder: Path, progress: Progress) -> None:
    """The tokenizer in `folder`, made where it is absent; a changed one is refused."""
    file, note = folder / "tokenizer.json", folder / "tokenizer.sha256"
    if file.is_file() and note.is_file():
        if note.read_text() != hashlib.sha256(file.read_bytes()).hexdigest():
            raise ValueError(
                f"{file} is not the one that this run was begun with: its weights would mean other"
                " words. Put it back, or start in another workdir."
            )
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
    make_tokenizer(folder, documents, vocab_size=config.model.vocab_size, whole=WHOLE)
    note.write_text(hashlib.sha256(file.read_bytes()).hexdigest())
