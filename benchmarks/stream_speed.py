"""How many examples a second the stream delivers, and how many the nano training step takes.

    python benchmarks/stream_speed.py [--examples 512] [--workers 0 1 2]

Builds a ClevrPolicy set of the nano config's pictures in a scratch folder, then times

    decode     shards -> Examples
    + pixels   PNG -> resized uint8 -> patches in windows (what the vision tower takes)
    + tokens   the whole training row (chat template, tokenizer, positions)
    step       the nano model's CoT-SFT step (gradients of LoRA, batch 8), the consumer

with `--workers` processes reading ahead (0 = a thread). `examples/s` is wall time, the median of
windows of 8 batches; `cpu` is `time.process_time` an example, all threads of this process together,
which stays honest on a machine that others use too (workers are other processes: no figure).
Next: benchmarks/renderer_speed.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 8  # configs/nano.py, cot_sft.batch
WINDOW = 8  # batches timed together


def pixels_of(example: Any, *, processor: Any) -> Any:
    """Decoded, resized and cut into patches."""
    from data_pipelines.example import decode_image
    from trimpi_jax.models.packing import pack_images
    from trimpi_jax.models.processor import resize_image

    images = [resize_image(decode_image(image), processor) for image in example.images]
    return pack_images(images, processor.vision)


def rate(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """(examples a second, median over windows; CPU ms an example), after the first batch."""
    next(batches)
    rates, cpu = [], time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        for _ in itertools.repeat(None, WINDOW):
            next(batches)
        rates.append(WINDOW * BATCH / (time.perf_counter() - start))
    return statistics.median(rates), 1e3 * (time.process_time() - cpu) / (count * WINDOW * BATCH)


def step_rate(rows: list[Any], count: int) -> tuple[float, float]:
    """`rate` of the nano model's CoT-SFT step on this machine's default device."""
    import jax

    from configs import nano
    from trimpi_jax.inputs.batching import fill_batch
    from trimpi_jax.models.hf_weights import load_hf
    from trimpi_jax.models.lora import add_lora
    from trimpi_jax.sharding import make_mesh
    from trimpi_jax.stages.model_files import model_folder
    from trimpi_jax.stages.run_settings import (
        optimizer_settings,
        step_settings,
        training_shapes,
        with_lora_scale,
    )
    from trimpi_jax.stages.supervised import make_supervised_step
    from trimpi_jax.stages.train_state import init_train_state, make_optimizer

    config = nano.get_config("method=cot_sft")
    model, params = load_hf(model_folder(config.model_dir))
    model = with_lora_scale(model, config.cot_sft)
    params = add_lora(params, model, jax.random.key(0), config.cot_sft.lora_rank)
    optimizer = make_optimizer(optimizer_settings(config.cot_sft, 100))
    state = init_train_state(params, optimizer, "lora")
    step = make_supervised_step(model, optimizer, step_settings(config, "cot_sft"))
    batch = fill_batch(rows[:BATCH], training_shapes(config, "cot_sft", make_mesh(1, 1, 1)))

    def losses() -> Iterator[Any]:
        nonlocal state
        while True:
            state, metrics = step(state, batch)
            yield jax.block_until_ready(metrics)

    return rate(losses(), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()

    from data_pipelines.build import build
    from data_pipelines.clevr_policy.dataset import ClevrPolicySettings
    from data_pipelines.streaming import make_stream, read_split
    from trimpi_jax.models.hf_weights import load_hf
    from trimpi_jax.models.processor import load_processor
    from trimpi_jax.stages.model_files import model_folder
    from trimpi_jax.stages.pipeline import encode_training_row

    folder = model_folder("assets/nano")
    processor = load_processor(folder, load_hf(folder)[0])
    pixels = functools.partial(pixels_of, processor=processor)
    row = functools.partial(encode_training_row, processor=processor, stage="cot_sft")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        settings = ClevrPolicySettings(
            policies=2, train_per_policy=given.examples // 2, cot_per_policy=given.examples // 2,
            test=2, width=168, height=112, max_objects=5,
        )  # fmt: skip
        build("clevr_policy", settings, data)
        rows = [row(example) for example in read_split(data, "cot", BATCH)]
        taken, step_cpu = step_rate(rows, given.windows)
        print(f"{'nano CoT-SFT step takes':36} {taken:7.0f} examples/s, {step_cpu:7.2f} ms cpu")
        for workers in given.workers:
            for name, each in (("decode", None), ("+ pixels", pixels), ("+ tokens", row)):
                stream = make_stream(
                    data, "cot", batch_examples=BATCH, seed=0, workers=workers, each=each
                )
                found, cpu = rate(stream, given.windows)
                stream.close()
                line = f"stream, {workers} workers, {name:16} {found:7.0f} examples/s"
                line += f" = {found / taken:.1f} x the step"
                if not workers:
                    line += f", {cpu:7.2f} ms cpu = 1/{step_cpu / cpu:.0f} of the step's"
                print(line, flush=True)


if __name__ == "__main__":
    main()
