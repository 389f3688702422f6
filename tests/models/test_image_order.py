"""The tower does not know in which order the images of a row come."""

import jax
import numpy as np

from trimpi_jax.models import vlm
from trimpi_jax.models.packing import pack_images

ENCODE = jax.jit(vlm.encode_images, static_argnums=1)


def test_images_in_another_order_get_the_same_tokens(config, params):
    rng = np.random.default_rng(3)
    sizes = ((56, 224), (168, 84), (28, 28))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]

    def tokens_of(order):
        packed = pack_images([images[i] for i in order], config.vision)
        row = (packed.patches, packed.patch_hw, packed.patch_segment)
        visual = np.asarray(ENCODE(params, config, *(part[None] for part in row)))[0]
        return {i: visual[slots] for i, slots in zip(order, packed.slots, strict=True)}

    straight, turned = tokens_of((0, 1, 2)), tokens_of((2, 0, 1))
    for i, tokens in straight.items():
        assert np.abs(tokens).max() > 0.1
        np.testing.assert_allclose(tokens, turned[i], atol=2e-6, rtol=0)
    # and they are not the same by being equal everywhere
    assert np.abs(straight[0][:1] - straight[2]).max() > 1e-2
