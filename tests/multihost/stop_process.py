"""One of two processes of a loop; process 1 gets SIGTERM. See the test."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

rank, port, folder, stops_at = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)

import jax.numpy as jnp  # noqa: E402 - devices are known now
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from trimpi_jax.io.progress import Progress  # noqa: E402
from trimpi_jax.stages import loop  # noqa: E402

NUM_STEPS = 1000
mesh = jax.make_mesh((2,), ("data",))
whole = NamedSharding(mesh, PartitionSpec())
rows = NamedSharding(mesh, PartitionSpec("data"))


def spread(number):
    return jax.make_array_from_callback(
        (2,), rows, lambda at: jnp.arange(2, dtype=jnp.float32)[at] + number
    )


@jax.jit
def add(total, numbers):
    return (total * 3 + numbers) % 1009, jnp.sum(numbers)  # the sum is over both processes


def take_step(state, step, numbers):
    if rank == 1 and step == stops_at:
        os.kill(os.getpid(), signal.SIGTERM)
    if 0 <= stops_at <= step:  # steps of a real model are slow beside a notice on its way
        time.sleep(0.05)
    total, loss = add(state["total"], numbers)
    jax.block_until_ready(loss)
    return {"total": total}, {"train/loss": loss.addressable_data(0)}


class Source:
    """Numbers from 0, with a place."""

    place = 0

    def fetch(self, step):
        self.place += 1
        return spread(self.place)


source = Source()
state = loop.run(
    # more steps than the notice needs to come around
    loop.LoopSettings(
        "toy", folder / str(rank), NUM_STEPS, 150, checkpoints=str(folder / "checkpoints")
    ),
    {"total": spread(0)},
    loop.Source(
        source.fetch,
        lambda: {"place": source.place},
        lambda saved: setattr(source, "place", saved["place"]),
    ),
    take_step,
    Progress(),
)
total = [float(shard.data[0]) for shard in state["total"].addressable_shards]
print(json.dumps({"place": source.place, "total": total}))
