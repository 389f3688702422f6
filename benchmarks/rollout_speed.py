"""Rollouts and updates: beside transformers and PyTorch, and what sharing the policy saves.

    python benchmarks/rollout_speed.py [--model nano|mini] [--repeats 5] [--cores 1] [--json FILE]

Float32 on CPU, same weights and inputs, runs of the two sides alternating, medians of CPU seconds
and of wall seconds with their spread (lowest to highest).

    decode            16 prompts x 8 samples, 64 new tokens, stop tokens off, temperature 1
    GRPO rollout      16 prompts, 16 policy-free samples each
    PoRo rollout      16 prompts, 8 policy-free and 8 policy-aware samples, a 1,400-token policy:
                      shared (read once), and with the policy in every prompt
    update            the GRPO loss and its gradient of 4 prompts x 16 completions of 64 tokens:
                      one row a group, one row a completion, and PyTorch with one row a completion
    long tails        16 x 8 samples of at most 256 tokens that stop at random (1 in 40), with and
                      without leaving out finished rows

With more than one core torch's threads burn CPU seconds while they wait for each other; one core is
the fair comparison on a busy machine. Needs the extra `parity` (torch).
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
import optax  # noqa: E402
import torch  # noqa: E402
from hf_side_by_side import mini_config, pixel_rows  # noqa: E402
from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

import trimpi_jax  # noqa: E402
from trimpi_jax.models import vlm  # noqa: E402
from trimpi_jax.models.hf_weights import load_hf  # noqa: E402
from trimpi_jax.models.packing import mrope_positions, pack_images  # noqa: E402
from trimpi_jax.objectives.grpo import ObjectiveSettings, policy_rollout_loss  # noqa: E402
from trimpi_jax.rollouts import sampler as sampling  # noqa: E402
from trimpi_jax.rollouts.choosing import SamplerSettings  # noqa: E402
from trimpi_jax.stages.policy_update import Distribution, make_update  # noqa: E402
from trimpi_jax.stages.supervised import StepSettings  # noqa: E402
from trimpi_jax.stages.train_state import init_train_state  # noqa: E402
from trimpi_jax.types import Batch, GroupBatch  # noqa: E402

PROMPTS, GROUP, NEW, POLICY = 16, 8, 64, 1400
CELLS = (4, 6)  # merged cells of an image
TOKENS = 84


class Case:
    """A model for both sides, and prompts for it."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        if name == "nano":
            folder = Path(trimpi_jax.__file__).parent / "assets" / "nano"
            self.torch = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
            self.config, params = load_hf(folder)
        else:
            config = mini_config()
            config._attn_implementation = "sdpa"
            self.torch = Qwen2_5_VLForConditionalGeneration(config).eval()
            with torch.no_grad():
                for weight in self.torch.parameters():
                    if weight.ndim > 1:
                        weight.normal_(std=0.05)
            with tempfile.TemporaryDirectory() as folder:
                self.torch.save_pretrained(folder)
                self.config, params = load_hf(Path(folder))
        self.config = dataclasses.replace(self.config, layer_loop="unrolled", eos_token_ids=())
        self.params = jax.device_put(params)
        self.vocabulary = self.config.text.vocab_size
        self.rng = np.random.default_rng(0)
        low, high = 100, self.vocabulary - 10
        self.images = [
            self.rng.integers(0, 256, (28 * CELLS[0], 28 * CELLS[1], 3), dtype=np.uint8)
            for _ in range(PROMPTS)
        ]
        cells = CELLS[0] * CELLS[1]
        self.tokens = self.rng.integers(low, high, (PROMPTS, TOKENS)).astype(np.int32)
        self.tokens[:, 10 : 10 + cells] = self.config.image_token_id
        self.tokens[:, 9] = self.config.vision_start_token_id
        self.tokens[:, 10 + cells] = self.config.vision_end_token_id
        self.policy = self.rng.integers(low, high, (POLICY,)).astype(np.int32)

    def prompts(self, policy: bool = False, offset: int = 0) -> Batch:
        """PROMPTS rows; `policy` puts the document in front of each, `offset` only counts on."""
        tokens = self.tokens
        if policy:
            before = np.broadcast_to(self.policy, (PROMPTS, POLICY))
            tokens = np.concatenate([before, tokens], axis=1)
        packed = [pack_images([image], self.config.vision) for image in self.images]
        index = np.full_like(tokens, -1)
        positions = np.zeros((PROMPTS, 3, tokens.shape[1]), np.int32)
        delta = np.zeros(PROMPTS, np.int32)
        for i, one in enumerate(packed):
            index[i, tokens[i] == self.config.image_token_id] = one.slots[0]
            positions[i], delta[i] = mrope_positions(
                tokens[i], one.grids, self.config.image_token_id, 2
            )
        return jax.device_put(
            Batch(
                tokens=tokens,
                loss_mask=np.zeros(tokens.shape, bool),
                lengths=np.full(PROMPTS, tokens.shape[1], np.int32),
                positions=positions + offset,
                rope_delta=delta + offset,
                visual_index=index,
                patches=np.stack([one.patches for one in packed]),
                patch_hw=np.stack([one.patch_hw for one in packed]),
                patch_segment=np.stack([one.patch_segment for one in packed]),
                valid=np.ones(PROMPTS, bool),
            )
        )

    def document(self) -> Batch:
        """The policy alone, one row."""
        slots = self.config.vision.window_patches
        positions = np.broadcast_to(np.arange(POLICY, dtype=np.int32), (1, 3, POLICY))
        return jax.device_put(
            Batch(
                tokens=self.policy[None],
                loss_mask=np.zeros((1, POLICY), bool),
                lengths=np.full(1, POLICY, np.int32),
                positions=positions,
                rope_delta=np.zeros(1, np.int32),
                visual_index=np.full((1, POLICY), -1, np.int32),
                patches=np.zeros((1, 0, slots, 1), np.uint8),
                patch_hw=np.zeros((1, 0, slots, 2), np.int32),
                patch_segment=np.zeros((1, 0, slots), np.int32),
                valid=np.ones(1, bool),
            )
        )

    def torch_inputs(self, tokens: np.ndarray, images: list[np.ndarray]) -> dict:
        """What transformers takes for rows with one image each."""
        ids = torch.tensor(tokens).long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.config.image_token_id).int(),
            "pixel_values": torch.tensor(np.concatenate([pixel_rows(image) for image in images])),
            "image_grid_thw": torch.tensor([(1, 2 * CELLS[0], 2 * CELLS[1])] * len(images)),
        }


def make_rollout(case: Case, completions: int, *, policy: str = "", config=None, **options):
    """A call that samples; `policy` is "", "shared" or "copied"."""
    config = config or case.config
    new = options.pop("new", NEW)
    settings = SamplerSettings(completions=completions, max_new_tokens=new, **options)
    sampler = sampling.make_sampler(config, settings, case.vocabulary)
    encode = sampling.make_image_encoder(config, "float32")
    read = sampling.make_prefix_reader(config, "float32")
    prompts = case.prompts(policy == "copied", POLICY if policy == "shared" else 0)
    document, ids = case.document(), np.arange(PROMPTS, dtype=np.uint32)
    weights = sampling.make_weight_sync(config, "float32")(case.params, None)
    valid = np.ones(PROMPTS, bool)

    def run():
        prefix = None
        if policy == "shared":
            prefix = sampling.Prefix(read(case.params, document), np.full(1, POLICY, np.int32))
        visual = encode(case.params, prompts)
        standing, last = sampler.prefill(
            case.params, prompts, visual, jax.random.key(0), ids, prefix
        )
        rollouts = sampling.decode(
            sampler, weights, standing, last, valid, keep_rows=prefix is not None
        )
        return jax.block_until_ready(rollouts)

    return run


def make_their_rollout(case: Case):
    """The same samples by `generate`, which repeats image and prompt for every sample."""
    inputs = case.torch_inputs(case.tokens, case.images)

    def run():
        with torch.inference_mode():
            return case.torch.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=GROUP,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                use_cache=True,
                pad_token_id=0,
            )

    return run


def make_updates(case: Case) -> dict:
    """Loss and gradient of four groups of 16: ours as trees and as rows, PyTorch as rows."""
    groups, rollouts = 4, 2 * GROUP
    rng = np.random.default_rng(1)
    said = rng.integers(100, case.vocabulary - 10, (groups, rollouts, NEW)).astype(np.int32)
    rewards = rng.choice([0.0, 1.0], (groups, rollouts)).astype(np.float32)
    behavior = np.full((groups, rollouts, NEW), -9.0, np.float32)
    prompts = jax.tree.map(lambda leaf: leaf[:groups], case.prompts())
    objective = ObjectiveSettings(kl_beta=0.0)
    optimizer = optax.sgd(0.0)  # the cost of loss and gradient, not of an optimizer
    distribution = Distribution(tuple([True] * case.vocabulary), 1.0)
    update = make_update(
        case.config, optimizer, objective, distribution, StepSettings("all"), GROUP
    )
    batch = GroupBatch(prompts, said, np.full((groups, rollouts), NEW, np.int32), rewards, behavior)
    state = [init_train_state(jax.tree.map(jnp.copy, case.params), optimizer, "all")]

    def tree():
        state[0], metrics = update(state[0], batch, None, behavior, None)
        return jax.block_until_ready(metrics["train/loss"])

    rows = np.concatenate(
        [np.repeat(case.tokens[:groups], rollouts, axis=0), said.reshape(-1, NEW)], axis=1
    )
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, rollouts, axis=0), prompts)
    following = (prompts.lengths + prompts.rope_delta)[:, None] + np.arange(NEW)
    following = np.repeat(np.repeat(following[:, None], 3, axis=1), rollouts, axis=0)
    positions = np.concatenate([repeated.positions, following], axis=2)
    index = np.pad(repeated.visual_index, ((0, 0), (0, NEW)), constant_values=-1)
    lengths = np.full(len(rows), TOKENS + NEW, np.int32)

    @jax.jit
    def by_rows(params):
        def loss(params):
            visual = vlm.encode_images(
                params, case.config, prompts.patches, prompts.patch_hw, prompts.patch_segment
            )
            visual = jnp.repeat(visual, rollouts, axis=0)
            hidden = vlm.hidden_states(params, case.config, rows, positions, lengths, visual, index)
            logprobs, _ = vlm.token_logprobs(
                params, case.config, hidden[:, TOKENS - 1 : -1], rows[:, TOKENS:], 8192
            )
            mask = np.ones((groups, rollouts, NEW), bool)
            return policy_rollout_loss(
                logprobs.reshape(mask.shape), behavior, None, None, rewards, mask, objective,
                jnp.float32(groups * rollouts),
            )[0]  # fmt: skip

        return jax.value_and_grad(loss)(params)

    images = [case.images[i] for i in range(groups) for _ in range(rollouts)]
    inputs = case.torch_inputs(rows, images)
    targets = torch.tensor(rows[:, TOKENS:]).long()
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    advantages = torch.tensor(advantages.reshape(-1, 1))
    old = torch.tensor(behavior.reshape(-1, NEW))

    def theirs():
        case.torch.zero_grad(set_to_none=True)
        logits = case.torch(**inputs, use_cache=False, logits_to_keep=NEW + 1).logits[:, :-1]
        logprobs = -torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
        ).reshape(targets.shape)
        ratio = torch.exp(logprobs - old)
        value = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
        loss = -value.mean(1).mean()
        loss.backward()
        return loss.detach()

    losses = float(tree()), float(by_rows(case.params)[0]), float(theirs())
    print("loss of one row a group, one row a completion, PyTorch:", *(f"{x:.6f}" for x in losses))
    return {
        "update, one row a group": tree,
        "update, one row a completion": lambda: jax.block_until_ready(by_rows(case.params)),
        "update, PyTorch": theirs,
    }


def measure(calls: dict, repeats: int) -> dict:
    """Name -> CPU and wall seconds: median, lowest, highest. Runs alternate after a warm-up."""
    times: dict[str, list] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                times[name].append(spent)
    return {
        name: {
            part: [statistics.median(column), min(column), max(column)]
            for part, column in zip(("cpu_s", "wall_s"), zip(*runs, strict=True), strict=True)
        }
        for name, runs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", choices=("nano", "mini"))
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.cores)
    case = Case(options.model)
    stopping = dataclasses.replace(
        case.config, eos_token_ids=tuple(range(100, 100 + (case.vocabulary - 110) // 40))
    )
    # hot: a trained model would hardly ever say one of these tokens
    tails = {"new": 256, "config": stopping, "temperature": 8.0}
    calls = {
        "decode, ours": make_rollout(case, GROUP),
        "decode, transformers": make_their_rollout(case),
        "GRPO rollout": make_rollout(case, 2 * GROUP),
        "PoRo free half": make_rollout(case, GROUP),
        "PoRo aware half, shared policy": make_rollout(case, GROUP, policy="shared"),
        "PoRo aware half, copied policy": make_rollout(case, GROUP, policy="copied"),
        "long tails": make_rollout(case, GROUP, **tails),
        "long tails, compacted": make_rollout(case, GROUP, compact_every=32, **tails),
        **make_updates(case),
    }
    results = measure(calls, options.repeats)
    print(f"{'':34} {'CPU s':>7} (lowest-highest)   {'wall s':>7}")
    for name, row in results.items():
        cpu, low, high = row["cpu_s"]
        print(f"{name:34} {cpu:7.3f} ({low:.3f}-{high:.3f})    {row['wall_s'][0]:7.3f}")

    def cpu(name):
        return results[name]["cpu_s"][0]

    new = PROMPTS * GROUP * NEW
    free, grpo = cpu("PoRo free half"), cpu("GRPO rollout")
    ratios = {
        "decode tokens per CPU second": new / cpu("decode, ours"),
        "of transformers": new / cpu("decode, transformers"),
        "times transformers": cpu("decode, transformers") / cpu("decode, ours"),
        "PoRo / GRPO, shared policy": (free + cpu("PoRo aware half, shared policy")) / grpo,
        "PoRo / GRPO, copied policy": (free + cpu("PoRo aware half, copied policy")) / grpo,
        "PyTorch / ours, update": cpu("update, PyTorch") / cpu("update, one row a group"),
        "rows / tree, update": cpu("update, one row a completion") / cpu("update, one row a group"),
        "plain / compacted tails": cpu("long tails") / cpu("long tails, compacted"),
    }
    for name, value in ratios.items():
        print(f"{name:34} {value:9.2f}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": results, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
