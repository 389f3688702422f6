"""ViT, prefill, forward + backward and decoding beside transformers: same weights, inputs, machine.

    python benchmarks/hf_side_by_side.py [--cores 1] [--repeats 7] [--json FILE]

Float32 on CPU, both sides pinned to the same cores, runs of the two alternating. A random model is
saved by transformers and loaded by both. Transformers gets SDPA attention (or `--attention eager`)
and `inference_mode` where nothing is differentiated. Reported: medians of CPU seconds and of wall
seconds, the ratio transformers / ours of the CPU medians, and how far the numbers of the two are
apart. With more than one core, torch's threads burn CPU seconds while they wait for each other, all
the more on a busy machine: one core is the fair comparison there. Needs the extra `parity` (torch).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# before torch and XLA make their threads
_CORES = int(sys.argv[sys.argv.index("--cores") + 1]) if "--cores" in sys.argv else 1
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from trimpi_jax.models import vlm  # noqa: E402
from trimpi_jax.models.hf_weights import load_hf  # noqa: E402
from trimpi_jax.models.packing import mrope_positions, pack_images  # noqa: E402
from trimpi_jax.models.vision import PIXEL_MEAN, PIXEL_STD  # noqa: E402
from trimpi_jax.rollouts import sampler as sampling  # noqa: E402
from trimpi_jax.rollouts.choosing import SamplerSettings  # noqa: E402
from trimpi_jax.types import Batch  # noqa: E402

IMAGE, START, END = 8190, 8188, 8189
PROMPTS, TOKENS, GROUP, NEW = 4, 128, 4, 33
CELLS = (8, 12)  # merged cells of the image: 16 x 24 patches, 96 visual tokens


def mini_config() -> Qwen2_5_VLConfig:
    """10.5 million parameters: six layers of width 256, four ViT blocks."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
            },
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 256,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )


def make_inputs(config) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same rows for both: one image and text each, all of TOKENS tokens."""
    rng = np.random.default_rng(0)
    height, width = (28 * side for side in CELLS)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(PROMPTS)]
    text = TOKENS - CELLS[0] * CELLS[1] - 2
    tokens = np.stack(
        [
            np.concatenate(
                [
                    rng.integers(3, 8000, text // 2),
                    [START, *[IMAGE] * (CELLS[0] * CELLS[1]), END],
                    rng.integers(3, 8000, text - text // 2),
                ]
            )
            for _ in range(PROMPTS)
        ]
    ).astype(np.int32)
    packed = [pack_images([image], config.vision) for image in images]
    index = np.full_like(tokens, -1)
    positions = np.zeros((PROMPTS, 3, TOKENS), np.int32)
    delta = np.zeros(PROMPTS, np.int32)
    for i, one in enumerate(packed):
        index[i, tokens[i] == IMAGE] = one.slots[0]
        positions[i], delta[i] = mrope_positions(tokens[i], one.grids, IMAGE, 2)
    batch = Batch(
        tokens=tokens,
        loss_mask=np.arange(TOKENS)[None] >= np.full((PROMPTS, 1), text // 2),
        lengths=np.full(PROMPTS, TOKENS, np.int32),
        positions=positions,
        rope_delta=delta,
        visual_index=index,
        patches=np.stack([one.patches for one in packed]),
        patch_hw=np.stack([one.patch_hw for one in packed]),
        patch_segment=np.stack([one.patch_segment for one in packed]),
        valid=np.ones(PROMPTS, bool),
    )
    ids = torch.tensor(tokens).long()
    theirs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.tensor(np.concatenate([pixel_rows(image) for image in images])),
        "image_grid_thw": torch.tensor([(1, 2 * CELLS[0], 2 * CELLS[1])] * PROMPTS),
    }
    return jax.device_put(batch), theirs


def pixel_rows(image: np.ndarray) -> np.ndarray:
    """Normalised rows [U, 1176] in the order of transformers' image processor."""
    scaled = ((image / 255.0 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)).astype(np.float32)
    h, w = (side // 28 for side in image.shape[:2])
    # [Y X C] -> [cell row, row, ph, cell column, column, pw, C] -> rows of (C, frame, ph, pw)
    cut = scaled.reshape(h, 2, 14, w, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    rows = cut.reshape(-1, 3, 1, 14, 14)
    return np.broadcast_to(rows, (len(rows), 3, 2, 14, 14)).reshape(len(rows), -1).copy()


def our_programs(params, config, batch: Batch):
    """Name -> a call that blocks and returns an array to compare."""

    def images(params):
        return vlm.encode_images(params, config, batch.patches, batch.patch_hw, batch.patch_segment)

    def hidden(params, remat="none"):
        arrays = (batch.tokens, batch.positions, batch.lengths, images(params), batch.visual_index)
        return vlm.hidden_states(params, config, *arrays, remat=remat)

    def last_logits(params):
        arrays = (batch.tokens, batch.positions, batch.lengths, images(params), batch.visual_index)
        last, kept = vlm.prefill(params, config, *arrays)
        return vlm.logits(params, config, last), kept

    def loss(params):
        logprobs, _ = vlm.token_logprobs(
            params,
            config,
            hidden(params)[:, :-1],
            batch.tokens[:, 1:],
            8192,
            needed=batch.loss_mask[:, 1:],
        )
        mask = batch.loss_mask[:, 1:]
        return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / jnp.sum(mask)

    vit, prefill = jax.jit(images), jax.jit(last_logits)
    gradient = jax.jit(jax.value_and_grad(loss))
    short, long = (make_decoder(params, config, batch, new) for new in (1, NEW))
    return {
        "ViT forward": lambda: jax.block_until_ready(vit(params)),
        "prefill": lambda: jax.block_until_ready(prefill(params))[0],
        "forward + backward": lambda: jax.block_until_ready(gradient(params))[0],
        "generate 1": lambda: jax.block_until_ready(short()),
        f"generate {NEW}": lambda: jax.block_until_ready(long()),
    }


def make_decoder(params, config, batch: Batch, new: int):
    """Greedy-free sampling of GROUP completions a prompt, never stopping before `new` tokens."""
    settings = SamplerSettings(completions=GROUP, max_new_tokens=new)
    endless = dataclasses.replace(config, eos_token_ids=())
    sampler = sampling.make_sampler(endless, settings, config.text.vocab_size)
    encode = sampling.make_image_encoder(config, settings.dtype)
    weights = sampling.make_weight_sync(config, settings.dtype)(params, None)
    ids, valid = np.arange(PROMPTS, dtype=np.uint32), np.ones(PROMPTS, bool)

    def run():
        visual = encode(params, batch)
        standing, last = sampler.prefill(params, batch, visual, jax.random.key(0), ids, None)
        return sampling.decode(sampler, weights, standing, last, valid).tokens

    return run


def their_programs(model, inputs):
    """The same calls of transformers."""
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    targets = inputs["input_ids"][:, 1:]
    text = TOKENS - CELLS[0] * CELLS[1] - 2
    mask = (torch.arange(TOKENS) >= text // 2)[None, 1:].expand(PROMPTS, -1)

    def vit():
        with torch.inference_mode():
            out = model.model.visual(pixels, grid_thw=grid)
            return getattr(out, "pooler_output", out)

    def prefill():
        with torch.inference_mode():
            return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    def forward_backward():
        model.zero_grad(set_to_none=True)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
        ).reshape(targets.shape)
        loss = (nll * mask).sum() / mask.sum()
        loss.backward()
        return loss.detach()

    def generate(new):
        with torch.inference_mode():
            return model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=GROUP,
                max_new_tokens=new,
                min_new_tokens=new,
                use_cache=True,
                pad_token_id=0,
            )

    return {
        "ViT forward": vit,
        "prefill": prefill,
        "forward + backward": forward_backward,
        "generate 1": lambda: generate(1),
        f"generate {NEW}": lambda: generate(NEW),
    }


def measure(ours, theirs, repeats: int):
    """Name -> ((CPU, wall) medians of theirs, of ours); runs alternate, two warm-ups each."""
    results = {}
    for name in ours:
        times = {"theirs": [], "ours": []}
        for number in range(repeats + 2):
            for who, call in (("theirs", theirs[name]), ("ours", ours[name])):
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                spent = time.process_time() - cpu, time.perf_counter() - wall
                if number >= 2:
                    times[who].append(spent)
        results[name] = {
            who: [statistics.median(column) for column in zip(*runs, strict=True)]
            for who, runs in times.items()
        }
    steps = NEW - 1
    last, first = results.pop(f"generate {NEW}"), results.pop("generate 1")
    results[f"decode step, {PROMPTS * GROUP} sequences"] = {
        who: [(last[who][i] - first[who][i]) / steps for i in (0, 1)] for who in last
    }
    results["first token, image included"] = first
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--attention", default="sdpa", help="of transformers: sdpa or eager")
    parser.add_argument("--loop", default="unrolled", help="ours: unrolled or scan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    config = mini_config()
    config._attn_implementation = options.attention
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours_config, params = load_hf(Path(folder))
    ours_config = dataclasses.replace(ours_config, layer_loop=options.loop)
    batch, inputs = make_inputs(ours_config)
    params = jax.device_put(params)
    ours = our_programs(params, ours_config, batch)
    theirs = their_programs(model, inputs)
    with torch.inference_mode():
        expected = theirs["prefill"]().numpy()
    apart = float(np.abs(np.asarray(ours["prefill"]()) - expected).max())
    results = measure(ours, theirs, options.repeats)
    print(f"max |logit difference| {apart:.1e} of {np.abs(expected).max():.1f}")
    print(f"{'':34} transformers CPU / wall      ours CPU / wall   ratio")
    for name, row in results.items():
        (their_cpu, their_wall), (our_cpu, our_wall) = row["theirs"], row["ours"]
        print(
            f"{name:34} {1e3 * their_cpu:9.1f} {1e3 * their_wall:9.1f} ms"
            f" {1e3 * our_cpu:9.1f} {1e3 * our_wall:9.1f} ms  {their_cpu / our_cpu:6.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"apart": apart, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
