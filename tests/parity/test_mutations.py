"""Errors that other ports have made must break parity: each is made here on purpose.

Source: the mistakes are listed in public ports of Qwen2.5-VL and Qwen3-VL (1-D positions, a band
instead of windows, attention across images, tanh GELU, rounded angles, swapped channel order).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.models import language, vision, vlm
from trimpi_jax.ops import attention

pytest.importorskip("torch")
TOLERANCE = 1e-5  # of test_hf_parity


@pytest.fixture(scope="module")
def correct(tied_pair):
    return _logprobs(tied_pair, tied_pair.batch)


def _logprobs(pair, batch):
    def run(params, batch):  # a new function each time, so that patched code is traced again
        return jax.nn.log_softmax(vlm.apply(params, pair.config, batch))

    real = np.arange(batch.tokens.shape[1])[None] < np.asarray(batch.lengths)[:, None]
    return np.asarray(jax.jit(run)(pair.params, batch))[real]


def _one_dimensional(monkeypatch, batch):
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.positions.shape)
    return batch.replace(positions=positions)


def _band(monkeypatch, batch):
    plain = attention.segment_attention

    def banded(q, k, v, segment):
        if segment.shape[0] == batch.tokens.shape[0]:
            return plain(q, k, v, segment)
        rows = batch.tokens.shape[0]
        flat = segment.reshape(rows, -1)
        place = np.arange(flat.shape[1])
        near = np.abs(place[:, None] - place[None, :]) < 64
        same = (flat[:, :, None] == flat[:, None]) & (flat > 0)[:, None]
        arrays = (a.reshape(rows, -1, *a.shape[2:]) for a in (q, k, v))
        return attention._attend(*arrays, same & near[None]).reshape(q.shape)

    monkeypatch.setattr(vision, "segment_attention", banded)
    return batch


def _leak(monkeypatch, batch):
    plain = attention.segment_attention
    leaking = lambda q, k, v, segment: plain(q, k, v, (segment > 0).astype(jnp.int32))  # noqa: E731
    monkeypatch.setattr(vision, "segment_attention", leaking)
    return batch


def _tanh_gelu(monkeypatch, batch):
    exact = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: exact(x, approximate=True))
    return batch


def _rounded_angles(monkeypatch, batch):
    plain = vision.vision_angles
    monkeypatch.setattr(
        vision,
        "vision_angles",
        lambda *args: plain(*args).astype(jnp.bfloat16).astype(jnp.float32),
    )
    return batch


def _column_first(monkeypatch, batch):
    return batch.replace(patch_hw=batch.patch_hw[..., ::-1])


def _channels_last(monkeypatch, batch):
    shape = batch.patches.shape
    swapped = batch.patches.reshape(*shape[:-1], 3, 196).swapaxes(-1, -2).reshape(shape)
    return batch.replace(patches=swapped)


def _sections_reversed(monkeypatch, batch):
    plain = language.mrope_angles
    monkeypatch.setattr(
        language, "mrope_angles", lambda p, h, t, section: plain(p, h, t, section[::-1])
    )
    return batch


def _slots_in_row_major_order(monkeypatch, batch):
    index = np.array(batch.visual_index)
    for row in index:
        row[row >= 0] = np.sort(row[row >= 0])
    return batch.replace(visual_index=jnp.asarray(index))


@pytest.mark.parametrize(
    "mutate",
    [
        _one_dimensional,
        _band,
        _leak,
        _tanh_gelu,
        _rounded_angles,
        _column_first,
        _channels_last,
        _sections_reversed,
        _slots_in_row_major_order,
    ],
)
def test_mutation_breaks_parity(tied_pair, correct, monkeypatch, mutate):
    wrong = _logprobs(tied_pair, mutate(monkeypatch, tied_pair.batch))
    assert np.abs(wrong - correct).max() > 2 * TOLERANCE
