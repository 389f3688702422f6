"""ClevrPolicy as Examples: policies, scenes, images, queries, answers, chains of thought.

Splits
    train   images of every policy with query and answer, no chain of thought (Direct SFT, RL)
    cot     the first `cot_per_policy` of them with their chain of thought (VM-CPT, CoT SFT)
    test    unseen scenes, spread evenly over the policies

The same settings and seed give the same Examples. Scenes come from the built-in sampler and
renderer, or from a CLEVR folder (images and scene graphs).

Source: paper section 2.
Next: data_pipelines/shards.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.clevr.recorded import read_picture, recorded_scenes
from data_pipelines.clevr.renderer import render_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import Scene
from data_pipelines.clevr_policy.tree import (
    PolicyTree,
    follow,
    is_held_out_tree,
    sample_balanced_tree,
    sample_name,
    tree_to_json,
)
from data_pipelines.clevr_policy.wording import answer, chain_of_thought, policy_text, query
from data_pipelines.example import Example, decode_image, encode_png
from data_pipelines.parts import Part, iter_splits

BALANCE_SCENES = 256  # scenes on which a tree's leaf shares are estimated
PART_EXAMPLES = 256  # scenes of one piece of a build, and Examples of a shard


@dataclasses.dataclass(frozen=True)
class ClevrPolicySettings:
    """What to build. Sizes are in examples; width and height in pixels."""

    depth: int = 2
    policies: int = 10
    train_per_policy: int = 2000
    cot_per_policy: int = 250
    test: int = 2000
    width: int = 480
    height: int = 320
    min_objects: int = 3
    max_objects: int = 10
    supersample: int = 2
    seed: int = 0
    clevr_dir: str = ""  # recorded pictures instead of the renderer: a CLEVR folder, or tfds:DIR

    def __post_init__(self):
        problems = []
        if self.policies < 1 or self.train_per_policy < 1 or self.test < self.policies:
            problems.append("policies, train_per_policy must be >= 1 and test >= policies")
        if self.cot_per_policy > self.train_per_policy:
            problems.append(
                f"cot_per_policy {self.cot_per_policy} exceeds train_per_policy"
                f" {self.train_per_policy}"
            )
        if not 1 <= self.min_objects <= self.max_objects:
            problems.append(f"objects {self.min_objects}..{self.max_objects} is no range")
        if problems:
            raise ValueError("ClevrPolicy settings: " + "; ".join(problems))


def make_policies(settings: ClevrPolicySettings) -> list[PolicyTree]:
    """The policies of a dataset: distinct held-out names, held-out trees, balanced cases."""
    scenes = _scenes(settings, "balance", 0, BALANCE_SCENES)
    policies: list[PolicyTree] = []
    for i in range(settings.policies):
        rng = np.random.default_rng([settings.seed, 1, i])
        taken = {policy.name for policy in policies}
        while (name := sample_name(rng, settings.depth, held_out=True)) in taken:
            pass
        tree = sample_balanced_tree(rng, name, settings.depth, scenes)
        while not is_held_out_tree(tree):
            tree = sample_balanced_tree(rng, name, settings.depth, scenes)
        policies.append(tree)
    return policies


def make_parts(settings: ClevrPolicySettings) -> list[Part]:
    """The dataset in pieces of at most PART_EXAMPLES scenes of one policy, for `parts.build_parts`.

    A piece of `train` also makes the chains of thought about its scenes: nothing is drawn twice.
    """
    parts = []
    test_counts = [len(part) for part in np.array_split(range(settings.test), settings.policies)]
    for i, tree in enumerate(make_policies(settings)):
        for split, count in (("train", settings.train_per_policy), ("test", test_counts[i])):
            for start in range(0, count, PART_EXAMPLES):
                counts = {split: min(PART_EXAMPLES, count - start)}
                if split == "train" and start < settings.cot_per_policy:
                    counts["cot"] = min(counts["train"], settings.cot_per_policy - start)
                make = functools.partial(_make_part, settings, tree, f"{split}{i}", start, counts)
                parts.append(Part(f"{split}{i}-{start}", counts, make))
    return parts


def _make_part(
    settings: ClevrPolicySettings, tree: PolicyTree, purpose: str, start: int, counts: dict
) -> dict[str, list[Example]]:
    scenes = _scenes(settings, purpose, start, max(counts.values()))
    images = _images(settings, scenes)
    return {
        split: [
            make_example(tree, scene, png, with_cot=split == "cot")
            for scene, png in zip(scenes[:count], images, strict=False)
        ]
        for split, count in counts.items()
    }


def make_splits(
    settings: ClevrPolicySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Iterator[Example]]:
    """Split name -> Examples, made lazily in this process; `on_progress(done, total)` in examples.

    Consume `train` before `cot`: what is not asked for yet is kept.
    """
    return iter_splits(make_parts(settings), on_progress)


def make_example(tree: PolicyTree, scene: Scene, png: bytes, *, with_cot: bool) -> Example:
    """One question about one scene under one policy."""
    visits, case = follow(tree, scene.objects)
    return Example(
        example_id=f"{tree.name}/{scene.scene_id}",
        images=(png,),
        query=query(tree.name),
        answer=answer(case),
        cot=chain_of_thought(tree, scene.objects) if with_cot else "",
        policy_name=tree.name,
        policy_text=policy_text(tree),
        meta={
            "task": "clevr_policy_t",
            "depth": tree.depth,
            "scene_id": scene.scene_id,
            "path": [visit.condition.section for visit in visits],
            "gold_cot": chain_of_thought(tree, scene.objects),
            "tree": tree_to_json(tree.root),
        },
    )


def _scenes(settings: ClevrPolicySettings, purpose: str, start: int, count: int) -> list[Scene]:
    """Scenes start..start+count-1 of a purpose ("train0", "test1", ...)."""
    if settings.clevr_dir:
        return _folder_slice(settings, purpose, start, count)
    # 32 bits of the purpose's letters: other purposes never share scenes
    purpose_seed = int.from_bytes(purpose.encode(), "little") % (2**61 - 1)
    return sample_scenes(
        int(np.random.SeedSequence([settings.seed, purpose_seed]).generate_state(1)[0]),
        start,
        count,
        min_objects=settings.min_objects,
        max_objects=settings.max_objects,
        width=settings.width,
        height=settings.height,
        id_prefix=f"s{settings.seed}-{purpose}",
    )


def _folder_slice(
    settings: ClevrPolicySettings, purpose: str, start: int, count: int
) -> list[Scene]:
    scenes = recorded_scenes(settings.clevr_dir)
    scenes = [scenes[i] for i in np.random.default_rng(settings.seed).permutation(len(scenes))]
    if purpose == "balance":
        return scenes[:count]
    train = settings.policies * settings.train_per_policy
    if len(scenes) < train + settings.test:
        raise ValueError(
            f"{settings.clevr_dir} has {len(scenes)} images with scene graphs, the settings need"
            f" {train} for training + {settings.test} for test; lower --config.data sizes"
        )
    kind, policy = purpose.rstrip("0123456789"), int(purpose.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if kind == "train":
        offset = policy * settings.train_per_policy
    else:
        sizes = [len(part) for part in np.array_split(range(settings.test), settings.policies)]
        offset = train + sum(sizes[:policy])
    return scenes[offset + start : offset + start + count]


def _images(settings: ClevrPolicySettings, scenes: Sequence[Scene]) -> list[bytes]:
    if not settings.clevr_dir:
        pixels = render_scenes(
            list(scenes),
            width=settings.width,
            height=settings.height,
            supersample=settings.supersample,
        )
        return [encode_png(image) for image in pixels]
    encoded = []
    for scene in scenes:
        pixels = decode_image(read_picture(scene), scene.image_path or scene.scene_id)
        size = (settings.width, settings.height)
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        encoded.append(encode_png(np.asarray(resized)))
    return encoded


def recipe(settings: ClevrPolicySettings) -> dict[str, Any]:
    """What decides the data, for the manifest."""
    import jax

    return {"dataset": "clevr_policy_t", "jax": jax.__version__, **dataclasses.asdict(settings)}


def licence(settings: ClevrPolicySettings) -> str:
    """Whose the pictures are, for the dataset card."""
    if settings.clevr_dir:
        return (
            "Pictures and scene graphs come from CLEVR_v1.0 (Johnson et al. 2017), Creative Commons"
            " Attribution 4.0 (CC BY 4.0); policies, questions and answers were generated by"
            " trimpi_jax, Apache-2.0."
        )
    return "Pictures, policies, questions and answers were generated by trimpi_jax, Apache-2.0."
