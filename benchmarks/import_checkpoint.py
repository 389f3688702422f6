"""Seconds and memory of reading and writing a checkpoint of a released size, made of random bits.

    python benchmarks/import_checkpoint.py --folder /scratch/of/20GB --size 3b --out figures.json

Four parts, each in a process of its own: make the checkpoint (bfloat16, shards of 5 GB), read it
onto the devices, write it again, compare the files; then everything is deleted. Memory is the peak
resident size of the process (VmHWM), which on a CPU holds the weights as well as what the import
needs beside them. The largest tensor is the embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

GiB = 2**30


def make(folder: Path, size: str) -> dict:
    import ml_dtypes
    import numpy as np

    from trimpi_jax.models.hf_weights import write_hf
    from trimpi_jax.models.releases import RELEASES

    rng = np.random.default_rng(0)

    def value(spec, dtype):
        bits = np.frombuffer(rng.bytes(2 * math.prod(spec.shape)), np.uint16)
        bits = (bits & 0x807F) | 0x3C00  # a sign, a fixed exponent, 7 random bits: about 0.01
        return bits.view(ml_dtypes.bfloat16).reshape(spec.shape)

    started = time.perf_counter()
    write_hf(folder / "source", RELEASES[size], value, "bfloat16", 5 * GiB)
    return {"seconds": time.perf_counter() - started}


def read(folder: Path, size: str) -> dict:
    import jax
    import jax.numpy as jnp

    from trimpi_jax.models import vlm
    from trimpi_jax.models.hf_names import tensor_specs
    from trimpi_jax.models.hf_weights import load_params, read_config, save_hf
    from trimpi_jax.sharding import make_mesh, param_shardings

    config = read_config(folder / "source")
    mesh = make_mesh()
    shardings = param_shardings(vlm.logical_axes(config), mesh, vlm.param_shapes(config))
    before = memory()
    started, worked = time.perf_counter(), time.process_time()
    params = load_params(folder / "source", config, shardings, dtype=jnp.bfloat16)
    jax.block_until_ready(params)
    figures = {
        "import_s": time.perf_counter() - started,
        "import_cpu_s": time.process_time() - worked,
        "weights_GiB": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / GiB,
        "largest_tensor_GiB": 2 * max(math.prod(s.shape) for s in tensor_specs(config)) / GiB,
        "before_GiB": before["VmRSS"],
        "import_peak_GiB": memory()["VmHWM"],
    }
    figures["beside_the_weights_GiB"] = (
        figures["import_peak_GiB"] - figures["before_GiB"] - figures["weights_GiB"]
    )
    started, worked = time.perf_counter(), time.process_time()
    save_hf(folder / "again", config, params, "bfloat16", 5 * GiB)
    return figures | {
        "export_s": time.perf_counter() - started,
        "export_cpu_s": time.process_time() - worked,
        "export_peak_GiB": memory()["VmHWM"],
    }


def memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmHWM", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 / GiB for name, value in pairs}


def same_files(folder: Path) -> bool:
    names = sorted(path.name for path in (folder / "source").glob("*.safetensors"))
    return names == sorted(path.name for path in (folder / "again").glob("*.safetensors")) and all(
        not subprocess.call(["cmp", "-s", folder / "source" / name, folder / "again" / name])
        for name in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", default="3b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("make", "read"))
    arguments = parser.parse_args()
    if arguments.part:
        part = make if arguments.part == "make" else read
        print(json.dumps(part(arguments.folder, arguments.size)))
        return
    folder = arguments.folder / "import_checkpoint"
    folder.mkdir(parents=True)
    try:
        figures: dict = {"size": arguments.size, "cores": os.cpu_count()}
        for name in ("make", "read"):
            command = [sys.executable, __file__, "--folder", folder, "--part", name]
            command += ["--size", arguments.size]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
        sizes = [path.stat().st_size for path in (folder / "source").glob("*.safetensors")]
        figures["files"], figures["files_GiB"] = len(sizes), sum(sizes) / GiB
        figures["written_again_bit_for_bit"] = same_files(folder)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
