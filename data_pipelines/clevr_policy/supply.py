"""Where ClevrPolicy's scenes and pictures come from: rendered, or recorded.

Every group of examples (a split of a policy) states its wish: how many objects a scene has and
which combinations of shape and colour may occur. Two wishes never share a scene. Asking beyond a
wish's count gives spare scenes, from which rare cases can be topped up.

    combinations   cubes                        cylinders                    spheres
    any            any colour                   any colour                   any colour
    cogent_a       gray, blue, brown, yellow    red, green, purple, cyan     any colour
    cogent_b       red, green, purple, cyan     gray, blue, brown, yellow    any colour

Source: CLEVR's CoGenT conditions, arXiv:1612.06890 section 4.7.
Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.clevr.recorded import read_picture, recorded_scenes
from data_pipelines.clevr.renderer import render_scenes
from data_pipelines.clevr.sampling import MARGIN, sample_scenes
from data_pipelines.clevr.scene import COLORS, Scene
from data_pipelines.example import decode_image, encode_png

ANY, COGENT_A, COGENT_B = "any", "cogent_a", "cogent_b"
_ONE = ("gray", "blue", "brown", "yellow")
_OTHER = ("red", "green", "purple", "cyan")
COLORS_OF = {  # combinations -> shape -> its colours
    ANY: {"cube": COLORS, "cylinder": COLORS, "sphere": COLORS},
    COGENT_A: {"cube": _ONE, "cylinder": _OTHER, "sphere": COLORS},
    COGENT_B: {"cube": _OTHER, "cylinder": _ONE, "sphere": COLORS},
}
CLEVR_MAX_OBJECTS = 10  # scenes of more are too full for CLEVR's margins between objects


@dataclasses.dataclass(frozen=True)
class SceneWish:
    """`count` scenes of a kind for one purpose ("train0", "test3"); purposes are unique."""

    purpose: str
    count: int
    min_objects: int
    max_objects: int
    combinations: str = ANY

    @property
    def kind(self) -> tuple[int, int, str]:
        """What a scene must be like, whatever its purpose."""
        return self.min_objects, self.max_objects, self.combinations


@dataclasses.dataclass(frozen=True)
class Supply:
    """Scenes and pictures for a list of wishes. `clevr_dir` "" = sampled and rendered here."""

    seed: int
    width: int
    height: int
    supersample: int
    clevr_dir: str
    wishes: tuple[SceneWish, ...]

    def take(self, wish: SceneWish, start: int, count: int) -> list[Scene]:
        """Scenes start..start+count-1 of a wish; recorded ones perhaps fewer, beyond its count."""
        if self.clevr_dir:
            return _allocate(self)[wish.purpose][start : start + count]
        purpose_seed = int.from_bytes(wish.purpose.encode(), "little") % (2**61 - 1)
        scenes = sample_scenes(
            int(np.random.SeedSequence([self.seed, purpose_seed]).generate_state(1)[0]),
            start,
            count,
            min_objects=wish.min_objects,
            max_objects=wish.max_objects,
            width=self.width,
            height=self.height,
            margin=MARGIN if wish.max_objects <= CLEVR_MAX_OBJECTS else 0.0,
            id_prefix=f"s{self.seed}-{wish.purpose}",
        )
        if wish.combinations == ANY:
            return scenes
        return [
            recolor(scene, wish.combinations, [self.seed, purpose_seed, start + i])
            for i, scene in enumerate(scenes)
        ]

    def pictures(self, scenes: Sequence[Scene]) -> list[bytes]:
        """The scenes' pictures as PNG, `width` x `height` px."""
        if not self.clevr_dir:
            pixels = render_scenes(
                list(scenes), width=self.width, height=self.height, supersample=self.supersample
            )
            return [encode_png(image) for image in pixels]
        return [encode_png(self._read(scene)) for scene in scenes]

    def _read(self, scene: Scene) -> np.ndarray:
        pixels = decode_image(read_picture(scene), scene.image_path or scene.scene_id)
        size = (self.width, self.height)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def recolor(scene: Scene, combinations: str, seed: Sequence[int]) -> Scene:
    """The scene with every colour drawn anew, uniformly among those its shape may have.

    Colours decide neither place nor visibility, so this is how the generator would draw them.
    """
    rng = np.random.default_rng(seed)
    allowed = COLORS_OF[combinations]
    objects = tuple(
        dataclasses.replace(thing, color=str(rng.choice(allowed[thing.shape])))
        for thing in scene.objects
    )
    return dataclasses.replace(scene, objects=objects)


def fits(scene: Scene, wish: SceneWish) -> bool:
    """Whether a scene is of the kind that is wished for."""
    allowed = COLORS_OF[wish.combinations]
    return wish.min_objects <= len(scene.objects) <= wish.max_objects and all(
        thing.color in allowed[thing.shape] for thing in scene.objects
    )


def fitting_scenes(supply: Supply, wish: SceneWish) -> list[Scene]:
    """All recorded scenes that fit a wish, in the seed's order, whoever else takes them."""
    return [scene for scene in _shuffled(supply.clevr_dir, supply.seed) if fits(scene, wish)]


@functools.lru_cache(maxsize=1)
def _shuffled(clevr_dir: str, seed: int) -> tuple[Scene, ...]:
    scenes = recorded_scenes(clevr_dir)
    order = np.random.default_rng(seed).permutation(len(scenes))
    return tuple(scenes[i] for i in order)


@functools.lru_cache(maxsize=1)
def _allocate(supply: Supply) -> dict[str, list[Scene]]:
    """Purpose -> its recorded scenes, then its share of the spare ones.

    Raises:
        ValueError: listing the groups for which there are too few recorded scenes.
    """
    scenes = _shuffled(supply.clevr_dir, supply.seed)
    fitting: dict[tuple, list[int]] = {}  # kind -> scenes that nobody of that kind has seen yet
    for wish in supply.wishes:
        if wish.kind not in fitting:
            fitting[wish.kind] = [i for i, scene in enumerate(scenes) if fits(scene, wish)]
    taken: set[int] = set()
    found: dict[str, list[Scene]] = {}
    problems = []
    for wish in supply.wishes:
        free = [i for i in fitting[wish.kind] if i not in taken]
        if len(free) < wish.count:
            problems.append(
                f"{wish.purpose}: {wish.count} wanted, {len(free)} left (of"
                f" {wish.min_objects}..{wish.max_objects} objects, combinations"
                f" '{wish.combinations}')"
            )
        found[wish.purpose] = [scenes[i] for i in free[: wish.count]]
        taken.update(free[: wish.count])
    if problems:
        raise ValueError(
            f"{supply.clevr_dir} has {len(scenes)} images with scene graphs, too few for"
            f" {len(problems)} of {len(supply.wishes)} groups; lower the sizes or widen"
            f" min_objects..max_objects:\n  " + "\n  ".join(problems[:6])
        )
    for i in sorted(set(range(len(scenes))) - taken):
        able = [wish for wish in supply.wishes if fits(scenes[i], wish)]
        if able:
            found[able[i % len(able)].purpose].append(scenes[i])
    return found
