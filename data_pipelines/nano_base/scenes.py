"""Rendered scenes with their objects, as Examples: the raw material of the nano base's training.

Each Example holds one image and, in `meta["objects"]`, its scene graph; the tasks (captions,
existence questions, policies) are drawn anew from it every time it is visited.

Next: data_pipelines/nano_base/mixture.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from data_pipelines.clevr.renderer import render_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import SceneObject
from data_pipelines.example import Example, encode_png

RENDER_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class SceneSetSettings:
    """How many scenes, and how they look. Pixels."""

    count: int = 20000
    width: int = 168
    height: int = 112
    min_objects: int = 3
    max_objects: int = 5
    supersample: int = 2
    seed: int = 0
    split: str = "train"


def make_scene_examples(
    settings: SceneSetSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Example]:
    """Render `count` scenes; the stream of seeds is apart from every ClevrPolicy set."""
    seed = int.from_bytes(f"nano-base-{settings.split}".encode(), "little") % (2**31 - 1)
    for start in range(0, settings.count, RENDER_CHUNK):
        size = min(RENDER_CHUNK, settings.count - start)
        scenes = sample_scenes(
            seed + settings.seed,
            start,
            size,
            min_objects=settings.min_objects,
            max_objects=settings.max_objects,
            width=settings.width,
            height=settings.height,
            id_prefix=f"base-{settings.split}",
        )
        pixels = render_scenes(
            scenes,
            width=settings.width,
            height=settings.height,
            supersample=settings.supersample,
        )
        for scene, image in zip(scenes, pixels, strict=True):
            yield Example(
                example_id=scene.scene_id,
                images=(encode_png(image),),
                query="",
                answer="",
                meta={"objects": [dataclasses.asdict(thing) for thing in scene.objects]},
            )
        on_progress(start + size, settings.count)


def scene_objects(example: Example) -> tuple[SceneObject, ...]:
    """The objects of an Example made above."""
    return tuple(
        SceneObject(
            **{
                **fields,
                "position": tuple(fields["position"]),
                "pixel_coords": tuple(fields["pixel_coords"]),
            }
        )
        for fields in example.meta["objects"]
    )
