"""Fused kernels equal the reference where they can run, and are lowered where they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.ops import kernels
from trimpi_jax.ops.attention import causal_attention, segment_attention
from trimpi_jax.sharding import make_mesh, on_shards


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(function):
    def total(q, k, v):
        return jnp.sum(jnp.sin(function(q, k, v)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-5)


def splash(q, k, v):
    return kernels.flash_causal(q, k, v, "splash_interpret")


def test_splash_is_the_causal_reference_with_its_gradients():
    # 150 is no multiple of 128: the kernel works on padded rows; six queries share two heads
    inputs = arrays(0, (2, 150, 6, 16), (2, 150, 2, 16), (2, 150, 2, 16))
    assert_close(with_gradients(splash)(*inputs), with_gradients(causal_attention)(*inputs))


def test_splash_keeps_segments_apart():
    inputs = arrays(1, *[(1, 200, 2, 20)] * 3)  # heads of 20, as 80 no multiple of 128
    segment = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 200)), jnp.int32)
    real = (segment > 0)[..., None, None]

    def ours(q, k, v):
        out = kernels.flash_segments(q, k, v, segment, "splash_interpret")
        return jnp.where(real, out, 0.0)

    def reference(q, k, v):
        return jnp.where(real, segment_attention(q, k, v, segment), 0.0)

    assert_close(with_gradients(ours)(*inputs), with_gradients(reference)(*inputs))


def test_splash_looks_back_inside_packed_rows_only():
    inputs = arrays(3, (2, 140, 4, 16), (2, 140, 2, 16), (2, 140, 2, 16))
    segment = np.sort(np.random.default_rng(1).integers(1, 4, (2, 140)), axis=1)
    segment = jnp.asarray(segment, jnp.int32)
    out = kernels.flash_causal(*inputs, "splash_interpret", segment)
    np.testing.assert_allclose(out, causal_attention(*inputs, segment), atol=2e-5)


def test_cudnn_refuses_packed_rows():
    inputs = arrays(3, (1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    with pytest.raises(ValueError, match="set pack_tokens and pack_windows to 0"):
        kernels.flash_causal(*inputs, "cudnn", jnp.ones((1, 4), jnp.int32))


@pytest.mark.parametrize("rows", [4, 3])  # 3 rows do not divide: every device takes all of them
def test_splash_on_eight_devices(rows):
    inputs = arrays(2, (rows, 40, 4, 8), (rows, 40, 2, 8), (rows, 40, 2, 8))
    axes = ("batch", None, "heads", None), *[("batch", None, "kv_heads", None)] * 2
    with jax.set_mesh(make_mesh(2, 2, 2)):
        out = jax.jit(lambda *a: on_shards(splash, a, axes))(*inputs)
        if rows == 4:
            assert out.sharding.shard_shape(out.shape) == (1, 40, 2, 8)
    np.testing.assert_allclose(out, causal_attention(*inputs), atol=2e-6)


def test_cudnn_is_lowered_for_cuda(monkeypatch):
    # the versions come from a driver that is not here; what is checked is the program
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)

    def total(q, k, v):
        return jnp.sum(kernels.flash_causal(q, k, v, "cudnn").astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((2, 64, n, 128), jnp.bfloat16) for n in (4, 2))
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "CAUSAL" in text


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "chosen"),
    [
        ("auto", "cpu", "float32", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "cuda", "float32", "xla"),  # cuDNN has no float32: the reference, silently
        ("auto", "tpu", "bfloat16", "splash"),
        ("flash", "gpu", "float16", "cudnn"),
        ("flash", "tpu", "float32", "splash"),
        ("xla", "tpu", "bfloat16", "xla"),
    ],
)
def test_the_choice(name, platform, dtype, chosen):
    assert kernels.choose_implementation(name, platform, dtype, 128) == chosen


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head", "message"),
    [
        ("cudnn", "gpu", "float32", 128, "needs dtype bfloat16 or float16.*'float32'"),
        ("cudnn", "gpu", "bfloat16", 132, "multiple of 8 and at most 128 wide, not 132"),
        ("cudnn", "tpu", "bfloat16", 128, "needs an NVIDIA GPU, and this is 'tpu'"),
        ("splash", "cpu", "float32", 128, "needs a TPU, and this is 'cpu'"),
        ("splash", "tpu", "float16", 128, "no float16"),
        ("flash", "cpu", "float32", 128, "needs a GPU or a TPU"),
        ("flahs", "cpu", "float32", 128, "must be one of"),
        ("splash_interpret", "cpu", "float32", 128, "must be one of"),  # for tests only
    ],
)
def test_a_kernel_that_cannot_run_says_why(name, platform, dtype, head, message):
    with pytest.raises(ValueError, match=message):
        kernels.choose_implementation(name, platform, dtype, head)
