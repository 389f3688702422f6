"""Window order, positions and patch rows against transformers, on random layouts."""

import numpy as np
import pytest

from tests.parity.rows import IMAGE_TOKEN, Row
from trimpi_jax.models.config import VisionConfig
from trimpi_jax.models.packing import mrope_positions, pack_images
from trimpi_jax.models.vision import normalise_pixels

torch = pytest.importorskip("torch")
from tests.parity.hf_reference import hf_inputs  # noqa: E402

VISION = VisionConfig(depth=2, width=64, heads=4, full_attention_blocks=(1,))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("window_size", [56, 112])
def test_windows(seed, window_size):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    rng = np.random.default_rng(seed)
    cells = rng.integers(1, 12, (rng.integers(1, 4), 2))
    config = VisionConfig(
        depth=2, width=64, heads=4, window_size=window_size, full_attention_blocks=(1,)
    )
    packed = pack_images([np.zeros((28 * h, 28 * w, 3), np.uint8) for h, w in cells], config)
    grids = torch.tensor(packed.grids)
    order, boundaries = vision_utils.get_vision_window_index(grids, 2, window_size, 14)
    np.testing.assert_array_equal(np.argsort(np.concatenate(packed.slots)), order.numpy())
    filled = (packed.patch_segment > 0).sum(axis=1)
    np.testing.assert_array_equal(np.cumsum(filled), boundaries.numpy()[1:])
    # slots of an image hold patches of that image, and real patches stand first in a window
    for number, slots in enumerate(packed.slots, start=1):
        assert (packed.patch_segment.reshape(-1, 4)[slots] == number).all()
    occupied = packed.patch_segment > 0
    assert (occupied[:, :-1] >= occupied[:, 1:]).all()


@pytest.mark.parametrize("seed", range(30))
def test_positions(tied_pair, seed):
    rng = np.random.default_rng(seed)
    grids, pieces = [], [rng.integers(3, 300, rng.integers(0, 6))]
    for _ in range(rng.integers(1, 5)):
        h, w = 2 * rng.integers(1, 9, 2)
        grids.append((1, int(h), int(w)))
        pieces += [[308], [IMAGE_TOKEN] * (h * w // 4), [309]]
        pieces += [rng.integers(3, 300, rng.integers(0, 6))]
    tokens = np.concatenate(pieces).astype(np.int32)
    positions, delta = mrope_positions(tokens, grids, IMAGE_TOKEN, 2)
    ids = torch.tensor(tokens).long()[None]
    theirs, their_delta = tied_pair.model.model.get_rope_index(
        ids, (ids == IMAGE_TOKEN).int(), torch.tensor(grids)
    )
    np.testing.assert_array_equal(positions, theirs[:, 0].numpy())
    assert delta == int(their_delta)


@pytest.mark.parametrize("size", [(28, 28), (140, 84), (112, 224), (252, 308)])
def test_patch_rows(size):
    """Our window-major rows, put back in order, are the processor's pixel_values."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = module.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 4096 * 28 * 28}
    )
    theirs = processor(images=[image], return_tensors="np")
    packed = pack_images([image], VISION)
    cells = packed.patches.reshape(-1, 4, 588)[packed.slots[0]]
    ours = np.asarray(normalise_pixels(cells.reshape(-1, 588), VISION))
    assert packed.grids == [tuple(theirs["image_grid_thw"][0])]
    frames = np.asarray(theirs["pixel_values"]).reshape(-1, 3, 2, 196)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    np.testing.assert_allclose(ours.reshape(-1, 3, 196), frames[:, :, 0], atol=2e-6, rtol=0)
    # the rows that the parity tests feed to the reference are the same
    spelled = hf_inputs(Row(np.zeros(1, np.int32), [image]))["pixel_values"].numpy()
    np.testing.assert_allclose(spelled, theirs["pixel_values"], atol=2e-6, rtol=0)
