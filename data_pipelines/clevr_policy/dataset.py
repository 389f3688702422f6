"""ClevrPolicy as Examples: policies, scenes, images, queries, answers, chains of thought.

Splits
    train         images of every policy with query and answer, no chain of thought (Direct SFT, RL)
    cot           the first `cot_per_policy` of them with their chain of thought (VM-CPT, CoT SFT)
    test          unseen scenes, policy after policy in turn
    validation    the same from other scenes, to tune on: neither trained on nor reported
    override      a fresh tree under each policy's name, to be put into the prompt
    cogent_b      test scenes with combinations of shape and colour that no other split has
    more_objects  test scenes of more objects than any other split's
    deeper        fresh policies two questions deeper, to be put into the prompt

The last five exist when their size is not 0. `meta["policy_in_prompt"]` is true where an answer
follows from a policy that no model was trained on; under `override`, `meta["trained_answer"]` is
what the policy of the training set would answer.

The same settings give the same Examples, whichever range of a split is made first: every number
drawn depends on (seed, what it is for, which one). Every case that a scene can reach occurs in
`test` and `override`, where they have room and a search of TOP_UP_SCENES more scenes can find it.

Source: paper section 2; CoGenT, arXiv:1612.06890.
Next: data_pipelines/shards.py
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.clevr.scene import Scene
from data_pipelines.clevr_policy.crops import CELL_PX, choose_shown, cut_crops, render_crops
from data_pipelines.clevr_policy.document import PolicyDocument, make_document
from data_pipelines.clevr_policy.supply import (
    ANY,
    COGENT_A,
    COGENT_B,
    SceneWish,
    Supply,
    fitting_scenes,
)
from data_pipelines.clevr_policy.tree import (
    MAX_DEPTH,
    PolicyTree,
    follow,
    is_held_out_tree,
    reachable_cases,
    sample_balanced_tree,
    sample_name,
    tree_to_json,
)
from data_pipelines.clevr_policy.wording import answer, chain_of_thought, query
from data_pipelines.example import Example
from data_pipelines.parts import Part, iter_splits

BALANCE_SCENES = 256  # scenes on which a tree's case shares are estimated
RENDER_CHUNK = 64  # pictures in memory before they are Examples
PART_EXAMPLES = 256  # scenes of one piece of a build, and Examples of a shard
TOP_UP_SCENES = 2048  # further scenes searched for cases that a policy's test scenes lack
TOP_UP_CHUNK = 256
TOPPED_UP = ("test", "validation", "override")  # the harder splits keep the cases as they come
EXTRA_OBJECTS = 3  # `more_objects` scenes have 1..3 objects above max_objects
EXTRA_DEPTH = 2  # of the `deeper` split
MAYBE = ("validation", "override", "cogent_b", "more_objects", "deeper")  # when not 0
VARIANTS = ("T", "M")
CROPS = ("rendered", "cut")

# what a random number is for; policies are 1 since the first datasets
POLICIES, SHOWN, OVERRIDES, DEEPER = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class ClevrPolicySettings:
    """Decision-tree policies about CLEVR scenes.

    Attributes:
        variant: T: the policy is text. M: some of its values are shown by small pictures.
        depth: questions on the longest path of a policy's tree, 1 to 10; the paper has 2, 4, 6.
        policies: how many policies, each with a name and a tree of its own.
        train_per_policy: training images of each policy.
        cot_per_policy: how many of them come with a chain of thought, too.
        test: unseen test images, spread over the policies.
        validation: images like the test's, to tune on; 0 = no such split.
        override: test images under a fresh tree of the same policy name; 0 = no such split.
        cogent_b: test images with combinations of shape and colour (CLEVR's CoGenT condition B)
            that all other splits then avoid (condition A); 0 = no such split, any combination.
        more_objects: test images with 1 to 3 more objects than max_objects; 0 = no such split.
        deeper: test images under new policies of depth + 2; 0 = no such split.
        shown_share: variant M: share of the conditions whose value is a picture.
        crop_px: variant M: side of these pictures in pixels, a multiple of 28.
        crops: variant M: "rendered", or "cut" from the images of clevr_dir.
        width: of an image, pixels.
        height: of an image, pixels.
        min_objects: fewest objects of a scene.
        max_objects: most objects of a scene.
        supersample: the renderer's samples along each side of a pixel.
        seed: other seeds give other policies, scenes and images.
        clevr_dir: recorded pictures instead of the renderer: a CLEVR folder (images/, scenes/),
            or tfds:DIR with a prepared `clevr` builder; "" = renderer.
    """

    variant: str = "T"
    depth: int = 2
    policies: int = 10
    train_per_policy: int = 2000
    cot_per_policy: int = 250
    test: int = 2000
    validation: int = 0
    override: int = 0
    cogent_b: int = 0
    more_objects: int = 0
    deeper: int = 0
    shown_share: float = 0.5
    crop_px: int = 56
    crops: str = "rendered"
    width: int = 480
    height: int = 320
    min_objects: int = 3
    max_objects: int = 10
    supersample: int = 2
    seed: int = 0
    clevr_dir: str = ""

    def __post_init__(self):
        problems = []
        if self.variant not in VARIANTS:
            problems.append(f"variant must be one of {VARIANTS}, got '{self.variant}'")
        if not 1 <= self.depth <= MAX_DEPTH:
            problems.append(f"tree depth must be in 1..{MAX_DEPTH}, got {self.depth}")
        elif self.deeper and self.depth + EXTRA_DEPTH > MAX_DEPTH:
            problems.append(
                f"deeper needs trees of depth {self.depth + EXTRA_DEPTH}, at most {MAX_DEPTH}"
            )
        if self.policies < 1 or self.train_per_policy < 1 or self.test < self.policies:
            problems.append("policies, train_per_policy must be >= 1 and test >= policies")
        if not 0 <= self.cot_per_policy <= self.train_per_policy:
            problems.append(
                f"cot_per_policy {self.cot_per_policy} exceeds train_per_policy"
                f" {self.train_per_policy} or is negative"
            )
        for name in MAYBE:
            size = getattr(self, name)
            if size and size < self.policies:
                problems.append(f"{name} must be 0 or at least one image a policy, got {size}")
        if not 1 <= self.min_objects <= self.max_objects:
            problems.append(f"objects {self.min_objects}..{self.max_objects} is no range")
        if min(self.width, self.height, self.supersample) < 1:
            problems.append("width, height and supersample must be >= 1")
        if self.seed < 0:
            problems.append(f"seed must be >= 0, got {self.seed}")
        problems += self._problems_of_crops()
        if self.clevr_dir and self.supersample != _default("supersample"):
            problems.append("supersample has no effect on the images of clevr_dir; leave it out")
        if problems:
            raise ValueError("ClevrPolicy settings: " + "; ".join(problems))

    def _problems_of_crops(self) -> list[str]:
        names = ("shown_share", "crop_px", "crops")
        if self.variant != "M":
            changed = [name for name in names if getattr(self, name) != _default(name)]
            return [f"{changed} have an effect in variant M only"] if changed else []
        problems = []
        if not 0 < self.shown_share <= 1:
            problems.append(f"shown_share must be in (0, 1], got {self.shown_share}")
        if self.crop_px < CELL_PX or self.crop_px % CELL_PX:
            problems.append(f"crop_px must be a multiple of {CELL_PX}, got {self.crop_px}")
        if self.crops not in CROPS:
            problems.append(f"crops must be one of {CROPS}, got '{self.crops}'")
        elif self.crops == "cut" and not self.clevr_dir:
            problems.append("crops='cut' needs the images of a clevr_dir")
        return problems


def _default(name: str) -> Any:
    return ClevrPolicySettings.__dataclass_fields__[name].default


def split_sizes(settings: ClevrPolicySettings) -> dict[str, int]:
    """Split -> number of Examples, in the order in which they are written."""
    sizes = {
        "train": settings.policies * settings.train_per_policy,
        "cot": settings.policies * settings.cot_per_policy,
        "test": settings.test,
    }
    return sizes | {name: getattr(settings, name) for name in MAYBE if getattr(settings, name)}


def make_parts(settings: ClevrPolicySettings) -> list[Part]:
    """The dataset in pieces of at most PART_EXAMPLES scenes, for `parts.build_parts`.

    A piece of `train` is about one policy and also makes the chains of thought about its scenes:
    nothing is drawn twice.
    """
    parts = []
    for split, size in split_sizes(settings).items():
        if split == "cot":
            continue
        block = settings.train_per_policy if split == "train" else size
        for first in range(0, size, block):
            for start in range(first, first + block, PART_EXAMPLES):
                stop = min(start + PART_EXAMPLES, first + block)
                counts = {split: stop - start}
                if split == "train" and (cot := settings.cot_per_policy - (start - first)) > 0:
                    counts["cot"] = min(cot, stop - start)
                make = functools.partial(make_range, settings, split, start, stop)
                parts.append(Part(f"{split}-{start}", counts, make))
    return parts


def make_splits(
    settings: ClevrPolicySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Iterator[Example]]:
    """Split name -> Examples, made lazily in this process; `on_progress(done, total)` in examples.

    Consume `train` before `cot`: what is not asked for yet is kept.
    """
    return iter_splits(make_parts(settings), on_progress)


def make_range(
    settings: ClevrPolicySettings, split: str, start: int, stop: int
) -> dict[str, list[Example]]:
    """Examples start..stop-1 of a split; those of `train` bring their `cot` Examples along.

    Depends on the arguments alone, so ranges can be made in any order and in any process.
    """
    supply = make_supply(settings)
    documents = documents_of(settings, split)
    rows: list[tuple[int, int]] = []  # (policy, its how-manieth scene)
    for i in range(start, stop):
        if split == "train":
            rows.append(divmod(i, settings.train_per_policy))
        else:  # in turn, so that any beginning of the split is about all policies
            rows.append((i % settings.policies, i // settings.policies))
    scenes: dict[tuple[int, int], Scene] = {}
    for policy in {policy for policy, _ in rows}:
        wanted = [at for of, at in rows if of == policy]
        found = _scenes_of(settings, split, policy, min(wanted), max(wanted) + 1)
        scenes |= {(policy, min(wanted) + n): scene for n, scene in enumerate(found)}
    made: dict[str, list[Example]] = {split: []}
    if split == "train" and any(at < settings.cot_per_policy for _, at in rows):
        made["cot"] = []
    for first in range(0, len(rows), RENDER_CHUNK):
        part = rows[first : first + RENDER_CHUNK]
        pictures = supply.pictures([scenes[row] for row in part])
        for (policy, at), png in zip(part, pictures, strict=True):
            document, scene = documents[policy], scenes[policy, at]
            example = make_example(document, scene, png, with_cot=False)
            if split in ("override", "deeper"):
                example.meta["policy_in_prompt"] = True
            if split == "override":
                trained = documents_of(settings, "train")[policy].tree
                example.meta["trained_answer"] = answer(follow(trained, scene.objects)[1])
            made[split].append(example)
            if split == "train" and at < settings.cot_per_policy:
                made["cot"].append(make_example(document, scene, png, with_cot=True))
    return made


def make_example(document: PolicyDocument, scene: Scene, png: bytes, *, with_cot: bool) -> Example:
    """One question about one scene under one policy."""
    tree = document.tree
    visits, case = follow(tree, scene.objects)
    gold_cot = chain_of_thought(tree, scene.objects, document.shown)
    meta = {
        "task": "clevr_policy_m" if document.crops else "clevr_policy_t",
        "depth": tree.depth,
        "scene_id": scene.scene_id,
        "num_objects": len(scene.objects),
        "path": [visit.condition.section for visit in visits],
        "gold_cot": gold_cot,
        "tree": tree_to_json(tree.root),
    }
    if document.crops:
        meta["shown"] = list(document.shown)
    return Example(
        example_id=f"{tree.name}/{scene.scene_id}",
        images=(png,),
        query=query(tree.name),
        answer=answer(case),
        cot=gold_cot if with_cot else "",
        policy_name=tree.name,
        policy_text=document.text,
        policy_images=document.images,
        meta=meta,
    )


def documents_of(settings: ClevrPolicySettings, split: str) -> tuple[PolicyDocument, ...]:
    """The policies that a split asks about, in order."""
    return _documents(settings, {"override": OVERRIDES, "deeper": DEEPER}.get(split, POLICIES))


@functools.lru_cache(maxsize=6)
def _documents(settings: ClevrPolicySettings, purpose: int) -> tuple[PolicyDocument, ...]:
    make = {POLICIES: make_policies, OVERRIDES: make_overrides, DEEPER: make_deeper}[purpose]
    return tuple(_make_documents(settings, make(settings), purpose))


def make_policies(settings: ClevrPolicySettings) -> list[PolicyTree]:
    """The policies of a dataset: distinct held-out names, held-out trees, balanced cases."""
    scenes = _balance_scenes(settings)
    policies: list[PolicyTree] = []
    for i in range(settings.policies):
        rng = np.random.default_rng([settings.seed, POLICIES, i])
        name = _new_name(rng, settings.depth, {policy.name for policy in policies})
        policies.append(_held_out_tree(rng, name, settings.depth, scenes))
    return policies


def make_overrides(settings: ClevrPolicySettings) -> list[PolicyTree]:
    """For each policy a fresh, balanced, held-out tree under its name that asks other questions."""
    scenes = _balance_scenes(settings)
    overrides = []
    for i, policy in enumerate(d.tree for d in documents_of(settings, "train")):
        rng = np.random.default_rng([settings.seed, OVERRIDES, i])
        tree = _held_out_tree(rng, policy.name, policy.depth, scenes)
        while tree.root == policy.root:
            tree = _held_out_tree(rng, policy.name, policy.depth, scenes)
        overrides.append(tree)
    return overrides


def make_deeper(settings: ClevrPolicySettings) -> list[PolicyTree]:
    """As many new policies, EXTRA_DEPTH questions deeper."""
    scenes, depth = _balance_scenes(settings), settings.depth + EXTRA_DEPTH
    deeper: list[PolicyTree] = []
    for i in range(settings.policies):
        rng = np.random.default_rng([settings.seed, DEEPER, i])
        name = _new_name(rng, depth, {policy.name for policy in deeper})
        deeper.append(_held_out_tree(rng, name, depth, scenes))
    return deeper


def make_supply(settings: ClevrPolicySettings) -> Supply:
    """The scenes and pictures of all splits."""
    return Supply(
        settings.seed,
        settings.width,
        settings.height,
        settings.supersample,
        settings.clevr_dir,
        tuple(wish for wishes in _wishes(settings).values() for wish in wishes),
    )


def describe(settings: ClevrPolicySettings) -> list[str]:
    """Facts of the policies for whoever builds them: distinct responses, and which occur."""
    lines = []
    for split, size in split_sizes(settings).items():
        if split in ("train", "cot"):
            continue
        trees = [document.tree for document in documents_of(settings, split)]
        cases = "/".join(str(n) for n in sorted({tree.num_cases for tree in trees}))
        line = f"{split}: {len(trees)} policies of depth {trees[0].depth}, {cases} distinct"
        line += " responses each"
        if split in TOPPED_UP:
            reachable = sum(len(reachable_cases(tree)) for tree in trees)
            met = 0
            for i, tree in enumerate(trees):
                scenes = _held_out_scenes(settings, split, i)
                met += len({follow(tree, scene.objects)[1] for scene in scenes})
            line += f"; of the {reachable} that scenes can reach, {met} occur in {size} examples"
        lines.append(line)
    return lines


def recipe(settings: ClevrPolicySettings) -> dict[str, Any]:
    """What decides the data, for the manifest."""
    import jax

    from data_pipelines.clevr.renderer import LOOK

    name = f"clevr_policy_{settings.variant.lower()}"
    made = {"dataset": name, "jax": jax.__version__, "look": LOOK}
    return made | dataclasses.asdict(settings)


def licence(settings: ClevrPolicySettings) -> str:
    """Whose the pictures are, for the dataset card."""
    if settings.clevr_dir:
        return (
            "Pictures and scene graphs come from CLEVR_v1.0 (Johnson et al. 2017), Creative Commons"
            " Attribution 4.0 (CC BY 4.0); policies, questions and answers were generated by"
            " trimpi_jax, Apache-2.0."
        )
    return "Pictures, policies, questions and answers were generated by trimpi_jax, Apache-2.0."


def _make_documents(
    settings: ClevrPolicySettings, trees: list[PolicyTree], purpose: int
) -> Iterator[PolicyDocument]:
    if settings.variant == "T":
        yield from (make_document(tree) for tree in trees)
        return
    scenes: list[Scene] = []
    if settings.crops == "cut":
        supply = make_supply(settings)
        scenes = [
            scene
            for wish in _wishes(settings)["train"]
            for scene in supply.take(wish, 0, wish.count)
        ]
    for i, tree in enumerate(trees):
        rng = np.random.default_rng([settings.seed, SHOWN, purpose, i])
        shown = choose_shown(rng, tree, settings.shown_share)
        if settings.crops == "cut":
            yield make_document(tree, cut_crops(rng, shown, scenes, settings.crop_px))
        else:
            yield make_document(tree, render_crops(rng, shown, settings.crop_px))


def _new_name(rng: np.random.Generator, depth: int, taken: set[str]) -> str:
    while (name := sample_name(rng, depth, held_out=True)) in taken:
        pass
    return name


def _held_out_tree(rng, name: str, depth: int, scenes: list[Scene]) -> PolicyTree:
    tree = sample_balanced_tree(rng, name, depth, scenes)
    while not is_held_out_tree(tree):
        tree = sample_balanced_tree(rng, name, depth, scenes)
    return tree


@functools.lru_cache(maxsize=4)
def _wishes(settings: ClevrPolicySettings) -> Mapping[str, tuple[SceneWish, ...]]:
    """Split -> what scenes each policy wants for it; `cot` takes those of `train`."""
    usual = (settings.min_objects, settings.max_objects)
    fuller = (settings.max_objects + 1, settings.max_objects + EXTRA_OBJECTS)
    combinations = COGENT_A if settings.cogent_b else ANY
    wishes = {}
    for split, size in split_sizes(settings).items():
        if split == "cot":
            continue
        counts = [len(part) for part in np.array_split(range(size), settings.policies)]
        objects = fuller if split == "more_objects" else usual
        kind = COGENT_B if split == "cogent_b" else combinations
        wishes[split] = tuple(
            SceneWish(f"{split}{i}", count, *objects, kind) for i, count in enumerate(counts)
        )
    return wishes


@functools.lru_cache(maxsize=2)
def _balance_scenes(settings: ClevrPolicySettings) -> list[Scene]:
    """Scenes like those of the training set, on which trees are balanced."""
    like = dataclasses.replace(_wishes(settings)["train"][0], purpose="balance")
    if settings.clevr_dir:
        return fitting_scenes(make_supply(settings), like)[:BALANCE_SCENES]
    return make_supply(settings).take(like, 0, BALANCE_SCENES)


def _scenes_of(
    settings: ClevrPolicySettings, split: str, policy: int, start: int, stop: int
) -> list[Scene]:
    if split == "train":
        return make_supply(settings).take(_wishes(settings)[split][policy], start, stop - start)
    return list(_held_out_scenes(settings, split, policy)[start:stop])


@functools.lru_cache(maxsize=256)
def _held_out_scenes(settings: ClevrPolicySettings, split: str, policy: int) -> tuple[Scene, ...]:
    """A policy's scenes of a split that is not trained on; TOPPED_UP: with the cases they lack.

    Where the first scenes miss a case that a scene can reach, the first spare scene that reaches it
    takes the place of the last scene of the most frequent case.
    """
    wish, supply = _wishes(settings)[split][policy], make_supply(settings)
    tree = documents_of(settings, split)[policy].tree
    scenes = supply.take(wish, 0, wish.count)
    cases = [follow(tree, scene.objects)[1] for scene in scenes]
    missing = set(reachable_cases(tree)) - set(cases) if split in TOPPED_UP else set()
    start = wish.count
    while missing and len(set(cases)) < len(cases) and start < wish.count + TOP_UP_SCENES:
        for scene in supply.take(wish, start, TOP_UP_CHUNK):
            case = follow(tree, scene.objects)[1]
            frequent, count = collections.Counter(cases).most_common(1)[0]
            if case in missing and count > 1:
                place = len(cases) - 1 - cases[::-1].index(frequent)
                scenes[place], cases[place] = scene, case
                missing.discard(case)
        start += TOP_UP_CHUNK
    return tuple(scenes)
