"""Our model against transformers in float32: logits, vision tower, every gradient, greedy text.

Rows: two images of unequal size, one aligned to the windows, text only, three images; all padded
into one batch of ours, one by one in the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity.rows import LAYOUTS, make_batch, make_row
from trimpi_jax.models import hf_weights, vlm
from trimpi_jax.models.language import DecodeContext
from trimpi_jax.ops.branches import Shared, share

torch = pytest.importorskip("torch")
from tests.parity.hf_reference import hf_inputs  # noqa: E402

TOLERANCE = 1e-5  # float32; logits are about 2.7, so this is 30 roundings
APPLY = jax.jit(vlm.apply, static_argnums=1)


def reference_logits(model, row):
    with torch.no_grad():
        return model(**hf_inputs(row)).logits[0].numpy()


def test_logits(pair):
    ours = np.asarray(APPLY(pair.params, pair.config, pair.batch))
    for name, row, mine in zip(LAYOUTS, pair.rows, ours, strict=True):
        theirs = reference_logits(pair.model, row)
        assert np.abs(theirs).max() > 1.0, "the reference must not be flat"
        np.testing.assert_allclose(
            mine[: len(theirs)], theirs, atol=TOLERANCE, rtol=0, err_msg=name
        )


def test_positions_are_the_references(tied_pair):
    for row, ours, delta in zip(
        tied_pair.rows, tied_pair.batch.positions, tied_pair.batch.rope_delta, strict=True
    ):
        inputs = hf_inputs(row)
        if not row.images:
            continue
        theirs, their_delta = tied_pair.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        np.testing.assert_array_equal(ours[:, : row.tokens.size], theirs[:, 0].numpy())
        assert int(delta) == int(their_delta)


def test_vision_tower(tied_pair):
    encode = jax.jit(vlm.encode_images, static_argnums=1)
    batch = tied_pair.batch
    ours = np.asarray(
        encode(
            tied_pair.params, tied_pair.config, batch.patches, batch.patch_hw, batch.patch_segment
        )
    )
    for i, row in enumerate(tied_pair.rows):
        if not row.images:
            continue
        inputs = hf_inputs(row)
        with torch.no_grad():
            theirs = tied_pair.model.model.visual(
                inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
            ).pooler_output.numpy()
        slots = np.asarray(batch.visual_index[i])
        np.testing.assert_allclose(ours[i][slots[slots >= 0]], theirs, atol=TOLERANCE, rtol=0)


def test_gradients_of_every_tensor(pair, tmp_path):
    """d/dw of the mean next-token log-probability, compared under the names on disk."""
    model, config = pair.model, pair.config
    chunk = 64 if config.text.tied else 10_000
    remat = "full" if config.text.tied else "none"  # one model with recomputation, one without

    def loss(params):
        batch = pair.batch
        visual = vlm.encode_images(
            params, config, batch.patches, batch.patch_hw, batch.patch_segment, remat=remat
        )
        hidden = vlm.hidden_states(
            params,
            config,
            batch.tokens,
            batch.positions,
            batch.lengths,
            visual,
            batch.visual_index,
            remat=remat,
        )
        logprobs, _ = vlm.token_logprobs(params, config, hidden[:, :-1], batch.tokens[:, 1:], chunk)
        counts = jnp.arange(1, batch.tokens.shape[1])[None] < batch.lengths[:, None]
        return jnp.sum(jnp.where(counts, logprobs, 0.0)) / jnp.sum(counts)

    value, gradients = jax.jit(jax.value_and_grad(loss))(pair.params)
    hf_weights.save_hf(tmp_path, config, gradients)
    ours = load_file(tmp_path / hf_weights.SINGLE_FILE)

    model.zero_grad()
    total, count = 0.0, 0
    for row in pair.rows:
        logprobs = torch.log_softmax(model(**hf_inputs(row)).logits[0, :-1], dim=-1)
        targets = torch.tensor(row.tokens[1:]).long()
        total = total + logprobs.gather(1, targets[:, None]).sum()
        count += targets.numel()
    (total / count).backward()
    assert float(value) == pytest.approx((total / count).item(), abs=1e-6)

    theirs = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in model.named_parameters()
    }
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, weight in theirs.items():
        reference = weight.grad.numpy()
        errors[name] = np.abs(ours[name] - reference).max() / np.abs(reference).max()
    model.zero_grad()
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, f"{worst}: {errors[worst]:.1e}"


def test_greedy_tokens(pair):
    """Prefill and cached decoding say what `generate` says, with a prompt shared by two."""
    steps, completions = 8, 2
    config, params, batch = pair.config, pair.params, pair.batch

    @jax.jit
    def generate(params, batch):
        visual = vlm.encode_images(
            params, config, batch.patches, batch.patch_hw, batch.patch_segment
        )
        last, prompt_kv = vlm.prefill(
            params,
            config,
            batch.tokens,
            batch.positions,
            batch.lengths,
            visual,
            batch.visual_index,
        )
        weights = vlm.decode_weights(params, jnp.float32)
        rows = batch.tokens.shape[0]
        shape = (rows, completions, config.text.kv_heads, steps, config.text.head_width)
        cache = [Shared(jnp.zeros(shape), jnp.zeros(shape)) for _ in prompt_kv]
        context = DecodeContext([share(kv) for kv in prompt_kv], batch.lengths)
        token = jnp.argmax(vlm.logits(params, config, last), axis=-1)
        token = jnp.broadcast_to(token[:, None], (rows, completions)).astype(jnp.int32)

        def one(carry, step):
            token, cache = carry
            start = (batch.lengths + batch.rope_delta)[:, None]
            positions = jnp.broadcast_to(start + step, token.shape)
            hidden, cache = vlm.decode_step(weights, config, token, positions, context, cache, step)
            following = jnp.argmax(vlm.logits(params, config, hidden), -1).astype(jnp.int32)
            return (following, cache), token

        _, said = jax.lax.scan(one, (token, cache), jnp.arange(steps))
        return said.transpose(1, 2, 0)  # [step Q G] -> [Q G step]

    said = np.asarray(generate(params, batch))
    for row, ours in zip(pair.rows, said, strict=True):
        inputs = hf_inputs(row)
        theirs = pair.model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None
        )[0, row.tokens.size :].numpy()
        for completion in ours:
            np.testing.assert_array_equal(completion, theirs)


def test_bfloat16_stays_near_float32(tied_pair):
    model = jax.jit(vlm.apply, static_argnums=1, static_argnames="dtype")
    wide = np.asarray(APPLY(tied_pair.params, tied_pair.config, tied_pair.batch))
    narrow = np.asarray(
        model(tied_pair.params, tied_pair.config, tied_pair.batch, dtype=jnp.bfloat16)
    )
    assert narrow.dtype == np.float32
    assert np.abs(wide - narrow).mean() < 2e-2  # bfloat16 has 8 bits; logits are about 2.7


def test_round_trip_through_transformers(pair, tmp_path):
    """What we write, transformers loads without a missing or unexpected key, bit for bit."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    hf_weights.save_hf(tmp_path, pair.config, pair.params, max_shard_bytes=400_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, ours = dict(pair.model.named_parameters()), dict(again.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name
    row = pair.rows[0]
    np.testing.assert_array_equal(
        reference_logits(again.eval(), row), reference_logits(pair.model, row)
    )


def test_text_only_batch_skips_the_tower(tied_pair):
    row = make_row("text_only")
    batch = make_batch([row], tied_pair.config)
    assert batch.patches.shape[1] == 0
    ours = np.asarray(APPLY(tied_pair.params, tied_pair.config, batch))[0]
    theirs = reference_logits(tied_pair.model, row)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
