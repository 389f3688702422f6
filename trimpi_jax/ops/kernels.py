"""Fused attention kernels: the same numbers as `attention.py`, without the matrix of logits.

    cudnn    causal rows on NVIDIA GPUs, through `jax.nn.dot_product_attention`
    splash   causal rows and segments on TPU, the Pallas kernel that ships with JAX

Both see one device's part of the arrays; `models` wraps them in `sharding.on_shards`. A name that
ends in `_interpret` runs a Pallas kernel step by step on any device: for tests, far too slow for
work.

Source: FlashAttention-2 (arXiv:2307.08691); `jax.experimental.pallas.ops.tpu.splash_attention`.
Next: trimpi_jax/ops/logprobs.py
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128  # width of a TPU vector register; splash wants sequences in multiples of it
MAX_BLOCK = 512  # tokens; larger tiles leave less of a v5e's 16 MB of vector memory to overlap
IMPLEMENTATIONS = ("xla", "cudnn", "splash", "splash_interpret")
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_MAX_HEAD = 128  # numbers per head; 256 from Hopper on


def choose_implementation(name: str, platform: str, dtype: str, head_width: int) -> str:
    """The implementation that a config's `attention` means on a platform.

    Args:
      name: "auto", "xla", "cudnn", "splash", or "flash" for the kernel of the platform.
      platform: "cpu", "gpu" (or "cuda") or "tpu".
      dtype: of the activations.
      head_width: numbers per head of the language model.

    Raises:
      ValueError: an unknown name, or a kernel that cannot run there, with the reason.
    """
    names = ("auto", "xla", "flash", "cudnn", "splash")
    if name not in names:
        raise ValueError(f"attention must be one of {names}, got {name!r}.")
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if name == "xla":
        return "xla"
    if name == "flash" and kernel is None:
        raise ValueError(
            f"attention 'flash' needs a GPU or a TPU, and this is {platform!r}. Use 'auto' or"
            " 'xla'."
        )
    wanted = kernel if name in ("auto", "flash") else name
    if wanted is None:
        return "xla"
    problems = []
    if wanted != kernel:
        needs = {"cudnn": "an NVIDIA GPU", "splash": "a TPU"}[wanted]
        problems.append(f"it needs {needs}, and this is {platform!r}")
    if wanted == "cudnn" and dtype not in CUDNN_DTYPES:
        problems.append(f"it needs dtype bfloat16 or float16, and the config says {dtype!r}")
    if wanted == "cudnn" and (head_width % 8 or head_width > CUDNN_MAX_HEAD):
        problems.append(
            f"heads must be a multiple of 8 and at most {CUDNN_MAX_HEAD} wide, not {head_width}"
        )
    if wanted == "splash" and dtype == "float16":
        problems.append("TPUs have no float16; use bfloat16")
    if problems and name == "auto":
        return "xla"
    if problems:
        raise ValueError(
            f"attention {name!r}: {'; '.join(problems)}. 'auto' takes the reference ('xla') here."
        )
    return wanted


def flash_causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    segment: jax.Array | None = None,
) -> jax.Array:
    """`attention.causal_attention` by a kernel: q [B, T, N, H], k and v [B, T, K, H].

    Raises:
      ValueError: segments for the cuDNN kernel, which knows none.
    """
    if implementation == "cudnn" and segment is not None:
        raise ValueError(
            "attention 'cudnn' cannot attend inside the segments of packed rows: set pack_tokens"
            " and pack_windows to 0, or --config.attention=xla"
        )
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return _splash(q, k, v, segment, causal=True, interpret=implementation == "splash_interpret")


def flash_segments(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, implementation: str
) -> jax.Array:
    """`attention.segment_attention` by a kernel; empty slots give other (finite) junk.

    Args:
      q, k, v: [B, S, N, H].
      segment: int32 [B, S], 0 = an empty slot.
    """
    return _splash(q, k, v, segment, causal=False, interpret=implementation == "splash_interpret")


def _splash(q, k, v, segment, *, causal: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, t, heads, h = q.shape
    padding = -t % LANES
    if padding:
        q, k, v = (jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))) for a in (q, k, v))
        segment = None if segment is None else jnp.pad(segment, ((0, 0), (0, padding)))
    length = t + padding
    mask_of = splash.CausalMask if causal else splash.FullMask
    mask = splash.MultiHeadMask([mask_of((length, length))] * heads)
    kernel = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(length),
        residual_checkpoint_name="attended",  # so that remat "attention" keeps them
        interpret=interpret,
    )
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * h**-0.5, k, v))  # [B T N H] -> [B N T H]
    out: Any
    if segment is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment, segment))
    return out.transpose(0, 2, 1, 3)[:, :t].astype(v.dtype)


@functools.cache
def _block_sizes(length: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if length % size == 0)
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
