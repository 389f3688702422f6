"""Real CLEVR-generator pictures beside the same scene graphs rendered here: one PNG for the docs.

    python benchmarks/clevr_side_by_side.py --clevr ../shared/data/clevr_real_sample \
        --out docs/pictures/clevr_side_by_side.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.clevr.renderer import render_scenes
from data_pipelines.clevr.scene_files import clevr_folder_scenes
from data_pipelines.example import decode_image

WIDTH, HEIGHT = 320, 240  # px, the official generator's default
ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clevr", type=Path, required=True, help="folder with images/ and scenes/")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    scenes = clevr_folder_scenes(arguments.clevr)
    # the richest scenes first
    scenes = sorted(scenes, key=lambda scene: -len(scene.objects))[:ROWS]
    ours = render_scenes(scenes, width=WIDTH, height=HEIGHT)
    rows = []
    for scene, rendered in zip(scenes, ours, strict=True):
        real = decode_image(Path(str(scene.image_path)).read_bytes(), str(scene.image_path))
        real = np.asarray(Image.fromarray(real).resize((WIDTH, HEIGHT)))
        rows.append(np.concatenate([real, rendered], axis=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
