"""Second and third leg of the nano base: the language model learns to read policies.

    frozen   the tower stands still; the visual tokens of every picture are computed once
    joint    the whole model, pictures as patches

A step's batch is a set of trees (see inputs/policy_trees.py): a policy, and several questions about
it behind it, each with a picture of its own.

Next: trimpi_jax/stages/nano_base.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.example import Example
from data_pipelines.nano_base import mixture
from data_pipelines.nano_base.mixture import DrawnPolicy, Phase
from data_pipelines.nano_base.pictures import Pictures, index_by_value
from data_pipelines.nano_base.text_questions import make_text_question
from trimpi_jax.inputs.policy_trees import DoesNotFit, TreeBatch, TreeShape, make_tree_batch
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.language import causal_kernel, embed_tokens, run_language
from trimpi_jax.models.processor import Processor
from trimpi_jax.objectives.cross_entropy import masked_nll_mean
from trimpi_jax.ops.branches import branch_attention
from trimpi_jax.stages.nano_perception import PatchSet, see
from trimpi_jax.stages.train_state import (
    TrainState,
    apply_gradients,
    join_params,
    split_params,
)

LOGPROB_CHUNK = 4096
MAX_ATTEMPTS = 100
ABOUT_SCENES = {
    "caption": mixture.make_caption,
    "existence": mixture.make_existence,
    "filter": mixture.make_filter,
}


@dataclasses.dataclass(frozen=True)
class ReadingSettings:
    """The mixture of a leg. `shapes` by task, policies by "policy_<depth>"."""

    num_steps: int
    seed: int
    phases: tuple[Phase, ...]
    shapes: Mapping[str, TreeShape]
    shown_share: float  # of a -M policy's values


@flax.struct.dataclass
class SeenTree:
    """A TreeBatch and its pictures, as visual tokens or as patches."""

    tree: TreeBatch
    pictures: Any  # [Z * R, cells, D] or uint8 [Z * R, W, P, ...]
    policy_pictures: Any  # [Z * K, cells, D] or uint8 [Z * K, 1, P, ...]; K may be 0


class PictureBank(NamedTuple):
    """What a batch takes its pictures from."""

    pictures: Pictures
    arrays: np.ndarray  # visual tokens or patches of all pictures, first axis N


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Step number -> (task, batch): a pure function of the settings, the pictures and the step."""

    settings: ReadingSettings
    processor: Processor
    scenes: PictureBank
    lone: PictureBank

    def __post_init__(self):
        object.__setattr__(self, "by_value", index_by_value(self.lone.pictures))

    def batch(self, step: int) -> tuple[str, SeenTree]:
        """The batch of a step; a row that does not fit its shape is drawn again."""
        settings = self.settings
        task = mixture.task_of_step(step, settings.num_steps, settings.phases, settings.seed)
        phase = mixture.phase_of_step(step, settings.num_steps, settings.phases)
        depth = int(np.random.default_rng([settings.seed, 37, step]).choice(phase.depths))
        name = f"{task}_{depth}" if task in ("policy", "recite") else task
        shape = settings.shapes[name]
        trees, scene_ids, lone_ids = [], [], []
        for row in range(shape.rows):
            tree, scenes, lone = self._fitting_row(step, row, task, depth, phase, shape)
            trees.append(tree)
            scene_ids += scenes
            lone_ids += lone + [0] * (shape.policy_pictures - len(lone))
        batch = SeenTree(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees),
            self.scenes.arrays[scene_ids],
            self.lone.arrays[lone_ids],
        )
        return name, batch

    def _fitting_row(self, step: int, row: int, task: str, depth: int, phase: Phase, shape):
        """One row, drawn until it fits: (TreeBatch of it, its scenes, its policy's pictures)."""
        problem = None
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng([self.settings.seed, 41, step, row, attempt])
            examples, scenes, lone = self._draw_row(rng, task, depth, phase, shape)
            try:
                return self._tree(examples, shape), scenes, lone
            except DoesNotFit as error:
                problem = error
        raise ValueError(
            f"{task}: {MAX_ATTEMPTS} rows one after another did not fit their shape {shape}; the"
            f" last one: {problem}. Give it more room."
        )

    def _draw_row(self, rng, task, depth, phase, shape):
        """(Examples, numbers of their scenes, numbers of the policy's pictures)."""
        scenes = rng.integers(len(self.scenes.pictures.objects), size=shape.branches).tolist()
        blank = [_scene_example(self.scenes.pictures, number) for number in scenes]
        if task == "text":
            return [make_text_question(rng, held_out=False) for _ in blank], scenes, []
        if task in ABOUT_SCENES:
            return [ABOUT_SCENES[task](rng, scene) for scene in blank], scenes, []
        shown_share = self.settings.shown_share if rng.random() < phase.shown else 0.0
        if task == "recite" and depth == 1:  # its one section must be words
            shown_share = 0.0
        shuffled = bool(rng.random() < phase.shuffled)
        policy = mixture.draw_policy(rng, depth, shown_share=shown_share, shuffled=shuffled)
        if task == "recite":
            examples = [mixture.recite_section(rng, policy) for _ in blank]
        else:
            examples = [mixture.ask_policy(policy, scene) for scene in blank]
        return examples, scenes, self._show(rng, policy)

    def _show(self, rng: np.random.Generator, policy: DrawnPolicy) -> list[int]:
        """A lone picture for every value that the policy shows."""
        by_value = self.by_value  # type: ignore[attr-defined]
        return [int(rng.choice(by_value[c.attribute, c.value])) for c in policy.shown]

    def _tree(self, examples: Sequence[Example], shape: TreeShape) -> TreeBatch:
        return make_tree_batch(
            [examples],
            self.processor,
            dataclasses.replace(shape, rows=1),
            picture_px=self.scenes.pictures.pixels.shape[1:3],
            policy_picture_px=self.lone.pictures.pixels.shape[1:3],
        )


def make_stream(source: Mixture, first_step: int) -> grain.DatasetIterator:
    """(task, batch) from `first_step` on, made ahead of time in threads."""

    class Make(grain.transforms.Map):
        def map(self, element: int) -> tuple[str, SeenTree]:
            return source.batch(int(element))

    dataset = grain.MapDataset.source(range(first_step, source.settings.num_steps)).map(Make())
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)))


def tree_hidden_states(
    params: Any, config: VLMConfig, tree: TreeBatch, visual: jax.Array, policy_visual: jax.Array
) -> jax.Array:
    """Hidden states of the branches, [Z, R, S, D] after the final norm.

    Args:
        params: the weights.
        config: the model.
        tree: the rows.
        visual: [Z, R, cells, D] of the branches' own pictures.
        policy_visual: [Z, M, D] of the policies' pictures, M >= 0.
    """
    z, r, s = tree.branch_tokens.shape
    length = tree.tokens.shape[1]

    def embed(tokens, visual_index, seen):
        x = embed_tokens(params["language"], config.text, tokens, jnp.dtype(jnp.float32))
        if not seen.shape[-2]:
            return x
        slot = jnp.maximum(visual_index, 0)[..., None]
        placed = jnp.take_along_axis(seen, slot, axis=-2)
        return jnp.where((visual_index >= 0)[..., None], placed, x)

    trunk = embed(tree.tokens, tree.visual_index, policy_visual)
    branches = embed(tree.branch_tokens, tree.branch_visual_index, visual)
    x = jnp.concatenate([trunk, branches.reshape(z, r * s, -1)], axis=1)
    positions = jnp.concatenate(
        [tree.positions, tree.branch_positions.reshape(z, 3, r * s)], axis=2
    )

    def attend(q, k, v):
        own = [leaf[:, length:].reshape(z, r, s, *leaf.shape[2:]) for leaf in (q, k, v)]
        head = [leaf[:, :length] for leaf in (q, k, v)]
        on_trunk = causal_kernel(config.attention)(*head)
        on_own = branch_attention(own[0], own[1], own[2], head[1], head[2], tree.lengths)
        return jnp.concatenate([on_trunk, on_own.reshape(z, r * s, *q.shape[2:])], axis=1)

    hidden, _ = run_language(
        params["language"],
        config.text,
        x,
        positions,
        layer_loop=config.layer_loop,
        remat="none",
        attend=attend,
    )
    return hidden[:, length:].reshape(z, r, s, -1)


def make_reading_step(
    config: VLMConfig,
    optimizer: optax.GradientTransformation,
    layouts: tuple[PatchSet, PatchSet] | None,
) -> Callable[[TrainState, SeenTree], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, batch) -> (state, metrics)`; the state is donated.

    `layouts` of scenes and lone pictures train the tower, too, from patches; None = the batch has
    visual tokens, and the tower stands still.
    """
    trainable = "all" if layouts else "all_but_vision"

    def step(state: TrainState, batch: SeenTree):
        trained, frozen = split_params(state.params, trainable)
        tree = batch.tree
        z, r = tree.branch_tokens.shape[:2]

        def loss_of(trained):
            params = join_params(trained, frozen)
            visual, shown = batch.pictures, batch.policy_pictures
            if layouts:
                visual = see(params["vision"], config, visual, layouts[0])
                shown = see(params["vision"], config, shown, layouts[1]) if len(shown) else None
            if shown is None or not len(shown):
                shown = jnp.zeros((z, 0, config.text.width))
            hidden = tree_hidden_states(
                params,
                config,
                tree,
                visual.reshape(z, r, -1, config.text.width),
                shown.reshape(z, -1, config.text.width),
            )
            mask = tree.loss_mask[:, :, 1:]
            logprobs, _ = vlm.token_logprobs(
                params,
                config,
                hidden[:, :, :-1],
                tree.branch_tokens[:, :, 1:],
                LOGPROB_CHUNK,
                needed=mask,
            )
            loss = masked_nll_mean(logprobs, mask)
            whole = jnp.all((logprobs > np.log(0.5)) | ~mask, axis=-1)
            return loss, {"train/loss": loss, "train/sure": jnp.mean(whole)}

        gradients, metrics = jax.grad(loss_of, has_aux=True)(trained)
        state, norm = apply_gradients(state, gradients, optimizer, trainable)
        return state, metrics | {"train/grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


def _scene_example(pictures: Pictures, number: int) -> Example:
    objects = [dataclasses.asdict(thing) for thing in pictures.objects[number]]
    return Example(str(number), (b"",), "", "", meta={"objects": objects})
