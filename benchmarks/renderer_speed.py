"""How fast scenes are sampled and drawn, one process, compilation not counted.

    python benchmarks/renderer_speed.py [--images 64] [--rounds 5]

Reads nothing, writes nothing, prints one row a setting. `wall` is what a user waits; `cpu` is
`time.process_time`, all threads together, which stays honest on a machine that others use too.
Both are the best of the rounds, per image. For comparison: CLEVR's own generator takes seconds an
image on a CPU (512 samples a pixel in Blender's Cycles).
Next: benchmarks/clevr_side_by_side.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipelines.clevr.renderer import render_masks, render_scenes
from data_pipelines.clevr.sampling import sample_scenes

SETTINGS = ((64, 64, 6), (168, 112, 6), (320, 240, 6), (320, 240, 10), (480, 320, 10))


def measure(action: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Best (wall, CPU) seconds of `rounds` calls, after one call that compiles."""
    action()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def report(name: str, seconds: tuple[float, float], count: int) -> None:
    wall, cpu = (1e3 * s / count for s in seconds)
    print(f"{name:34} {wall:8.2f} ms wall {cpu:8.2f} ms cpu {1e3 / wall:8.0f} /s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    count, rounds = given.images, given.rounds
    for most in (6, 10):
        seconds = measure(lambda most=most: sample_scenes(0, 0, count, max_objects=most), rounds)
        report(f"sample, 3-{most} objects", seconds, count)
    for width, height, most in SETTINGS:
        scenes = sample_scenes(0, 0, count, max_objects=most)
        name = f"{width}x{height}, 3-{most} objects"
        size = {"width": width, "height": height}
        report(
            f"render {name}", measure(lambda s=scenes, z=size: render_scenes(s, **z), rounds), count
        )
        report(
            f"masks  {name}", measure(lambda s=scenes, z=size: render_masks(s, **z), rounds), count
        )


if __name__ == "__main__":
    main()
