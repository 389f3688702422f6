"""One of two processes: loads a checkpoint, counts what it read, saves it again. See the test."""

import json
import sys
from pathlib import Path

import jax

rank, port, source, target = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)

from trimpi_jax.models import hf_files, hf_weights, vlm  # noqa: E402 - devices are known now
from trimpi_jax.sharding import make_mesh, param_shardings  # noqa: E402

read = hf_files.read_block
counted = {"bytes": 0}


def counting(*args):
    block = read(*args)
    counted["bytes"] += block.nbytes
    return block


hf_weights.read_block = counting
config = hf_weights.read_config(source)
mesh = make_mesh(1, 4, 1)
shardings = param_shardings(vlm.logical_axes(config), mesh, vlm.param_shapes(config))
params = hf_weights.load_params(source, config, shardings)
local = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(params)
    for shard in {str(shard.index): shard for shard in leaf.addressable_shards}.values()
)
hf_weights.save_hf(target, config, params)
print(json.dumps({"read": counted["bytes"], "local": local}))
