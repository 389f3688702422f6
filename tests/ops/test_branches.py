"""Branches of one prompt against attention over full rows, query by query."""

import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.ops.branches import Shared, branch_attention, decode_attention, share

PROMPTS, BRANCHES, TRUNK, OWN, HEADS, KV, WIDTH = 4, 3, 5, 6, 4, 2, 4
LENGTHS = np.array([5, 2, 4, 1])


def arrays(rng, *shapes):
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def one_query(q, keys, values):
    logits = keys @ q / np.sqrt(q.size)
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def test_every_branch_sees_the_prompt_and_itself():
    rng = np.random.default_rng(0)
    own = (PROMPTS, BRANCHES, OWN, KV, WIDTH)
    q, k, v, tk, tv = arrays(
        rng, (*own[:3], HEADS, WIDTH), own, own, *[(PROMPTS, TRUNK, KV, WIDTH)] * 2
    )
    out = branch_attention(*map(jnp.asarray, (q, k, v, tk, tv, LENGTHS)))
    for i, r, s, n in np.ndindex(PROMPTS, BRANCHES, OWN, HEADS):
        keys = np.concatenate([tk[i, : LENGTHS[i], n // 2], k[i, r, : s + 1, n // 2]])
        values = np.concatenate([tv[i, : LENGTHS[i], n // 2], v[i, r, : s + 1, n // 2]])
        np.testing.assert_allclose(
            out[i, r, s, n], one_query(q[i, r, s, n], keys, values), atol=2e-6
        )


def test_long_branches_go_in_blocks():
    rng = np.random.default_rng(1)
    own = (1, 2, 150, 1, WIDTH)  # three blocks of 64
    q, k, v, tk, tv = arrays(rng, own, own, own, *[(1, TRUNK, 1, WIDTH)] * 2)
    out = branch_attention(*map(jnp.asarray, (q, k, v, tk, tv, LENGTHS[:1])))
    for s in (0, 63, 64, 149):
        keys = np.concatenate([tk[0, :, 0], k[0, 1, : s + 1, 0]])
        values = np.concatenate([tv[0, :, 0], v[0, 1, : s + 1, 0]])
        expected = one_query(q[0, 1, s, 0], keys, values)
        np.testing.assert_allclose(out[0, 1, s, 0], expected, atol=2e-6)


@pytest.mark.parametrize("policies", [0, 1, 2, 4])
def test_a_decoding_step_sees_policy_prompt_and_itself(policies):
    rng = np.random.default_rng(2)
    q, ok, ov, tk, tv, pk, pv = arrays(
        rng,
        (PROMPTS, BRANCHES, HEADS, WIDTH),
        *[(PROMPTS, BRANCHES, OWN, KV, WIDTH)] * 2,
        *[(PROMPTS, TRUNK, KV, WIDTH)] * 2,
        *[(max(policies, 1), 7, KV, WIDTH)] * 2,
    )
    policy_lengths, step = np.array([7, 3, 5, 6])[: max(policies, 1)], 2
    own = Shared(*(jnp.asarray(leaf).transpose(0, 1, 3, 2, 4) for leaf in (ok, ov)))
    prefix = share((jnp.asarray(pk), jnp.asarray(pv))) if policies else None
    out = decode_attention(
        jnp.asarray(q),
        own,
        jnp.asarray(step),
        share((jnp.asarray(tk), jnp.asarray(tv))),
        jnp.asarray(LENGTHS),
        prefix,
        jnp.asarray(policy_lengths) if policies else None,
    )
    for i, g, n in np.ndindex(PROMPTS, BRANCHES, HEADS):
        kv, z = n // 2, i * policies // PROMPTS
        before = policy_lengths[z] if policies else 0
        keys = [pk[z, :before, kv], tk[i, : LENGTHS[i], kv], ok[i, g, : step + 1, kv]]
        values = [pv[z, :before, kv], tv[i, : LENGTHS[i], kv], ov[i, g, : step + 1, kv]]
        expected = one_query(q[i, g, n], np.concatenate(keys), np.concatenate(values))
        np.testing.assert_allclose(out[i, g, n], expected, atol=2e-6)
