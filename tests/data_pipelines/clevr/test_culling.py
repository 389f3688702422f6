"""Tiles that are left out show nothing and change nothing; most tiles are left out."""

import numpy as np
import pytest

from data_pipelines.clevr import renderer
from data_pipelines.clevr.culling import touched_tiles
from data_pipelines.clevr.renderer import render_masks, render_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import RADIUS, SHAPES, Scene, SceneObject, pack_solids

TILE = 4


def touched(scenes, width, height):
    kept = np.zeros((len(scenes), -(-height // TILE), -(-width // TILE)), bool)
    kept[touched_tiles(pack_solids(scenes, 10), width, height, TILE)] = True
    return kept


def tiles_of(mask):
    rows, columns = (-(-side // TILE) for side in mask.shape)
    padded = np.zeros((rows * TILE, columns * TILE), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask > 0
    return padded.reshape(rows, TILE, columns, TILE).any(axis=(1, 3))


@pytest.mark.parametrize(("width", "height"), [(160, 120), (90, 61)])
def test_every_tile_that_shows_an_object_is_kept(width, height):
    scenes = sample_scenes(21, 0, 12)
    kept = touched(scenes, width, height)
    for mask, here in zip(render_masks(scenes, width=width, height=height), kept, strict=True):
        assert not (tiles_of(mask) & ~here).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tiles_are_kept_in_vain(shape):
    thing = SceneObject(shape, "red", "large", "rubber", (0.5, 0.5, RADIUS["large"]), 0.4)
    scene = Scene("one", (thing,))
    (kept,) = touched([scene], 320, 240)
    needed = tiles_of(render_masks([scene], width=320, height=240)[0])
    # the rim: tiles that are touched beside their pixel centres, and what the hull is too wide
    assert needed.sum() <= kept.sum() <= 1.5 * needed.sum()


def test_an_empty_scene_keeps_no_tile():
    assert not touched([Scene("empty", ())], 64, 48).any()


@pytest.mark.parametrize(("width", "height"), [(168, 112), (96, 64)])  # with and without fine edges
def test_pictures_are_the_same_bytes_without_culling(width, height, monkeypatch):
    scenes = sample_scenes(5, 0, 6, max_objects=6)
    culled = render_scenes(scenes, width=width, height=height)

    def every_tile(packed, width, height, tile):
        shape = (len(packed["camera"]), -(-height // tile), -(-width // tile))
        return np.nonzero(np.ones(shape, bool))

    monkeypatch.setattr(renderer, "touched_tiles", every_tile)
    np.testing.assert_array_equal(culled, render_scenes(scenes, width=width, height=height))
