"""Real CLEVR pictures above our renderings of their scene files.

    python benchmarks/clevr_side_by_side.py SAMPLE [--out docs/pictures/clevr_side_by_side.png]

SAMPLE is a folder with pairs `*/scenes/CLEVR_*_scenes.json` and `*/images/*/*.png` in the layout of
CLEVR_v1.0. Camera jitter is fitted from the recorded pixels; lamp jitter is not recorded, so our
lamps stand where the generator's do on average. Prints, for each object, the ratio of our mean
colour to the real one in linear light.
Next: tests/data_pipelines/clevr/test_renderer.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipelines.clevr.renderer import render_masks, render_scenes
from data_pipelines.clevr.scene import Scene, load_clevr_scenes

COLUMNS = 4  # pictures in a row of the sheet
GAP_PX = 4


def find_scenes(sample: Path) -> list[Scene]:
    """Every scene of the sample whose picture is there."""
    found = []
    for file in sorted(sample.glob("*/scenes/CLEVR_*_scenes.json")):
        split = file.name.split("_")[1]
        scenes = load_clevr_scenes(file, file.parents[1] / "images" / split)
        found += [s for s in scenes if s.image_path and Path(s.image_path).is_file()]
    return found


def linear(picture: np.ndarray) -> np.ndarray:
    """sRGB bytes -> linear light (IEC 61966-2-1)."""
    value = picture / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def sheet(real: np.ndarray, ours: np.ndarray) -> Image.Image:
    """Rows of COLUMNS pictures, each real one above ours."""
    count, height, width, _ = real.shape
    rows = -(-count // COLUMNS)
    size = (COLUMNS * (width + GAP_PX), rows * 2 * (height + GAP_PX))
    canvas = Image.new("RGB", size, "white")
    for i in range(count):
        x, y = (i % COLUMNS) * (width + GAP_PX), (i // COLUMNS) * 2 * (height + GAP_PX)
        canvas.paste(Image.fromarray(real[i]), (x, y))
        canvas.paste(Image.fromarray(ours[i]), (x, y + height))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/clevr_side_by_side.png"))
    given = parser.parse_args()
    scenes = find_scenes(given.sample)
    if not scenes:
        raise SystemExit(f"No scene file with pictures under {given.sample}.")
    width, height = scenes[0].width, scenes[0].height
    real = np.stack([np.asarray(Image.open(s.image_path).convert("RGB")) for s in scenes])
    ours = render_scenes(scenes, width=width, height=height)
    masks = render_masks(scenes, width=width, height=height)
    for scene, a, b, mask in zip(scenes, real, ours, masks, strict=True):
        for number, o in enumerate(scene.objects, 1):
            there = mask == number
            ratio = linear(b[there]).mean(axis=0) / linear(a[there]).mean(axis=0)
            name = f"{o.size} {o.color} {o.material} {o.shape}"
            print(f"{scene.scene_id}  {name:32} ours / real {np.round(ratio, 2)}")
    chosen = slice(0, len(scenes) // COLUMNS * COLUMNS or len(scenes))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(real[chosen], ours[chosen]).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
