"""What a program needs: bytes per chip from the compiler, products from its jaxpr, the least time.

    bytes    arguments + outputs - donated + temporaries + code, as XLA allots them (on TPU the peak
             by which its compiler takes or refuses a program), and beside them what the stage keeps
             on the device that this program does not take
    FLOPs    2 per multiply-add of every matrix product, loops counted as often as they run
    floor    max(FLOPs / peak FLOP/s, bytes that must move / peak bandwidth): no program is faster

Bytes that must move: all weights in the dtype of the activations once per pass, arguments and
results once, keys and values of the cache once per decoding step. Peaks are the makers' figures.

Next: trimpi_jax/preflight.py
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.stages.programs import Program

GIB = 2**30
RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its maker's data sheet has it."""

    name: str
    memory_gib: float  # that a program can have
    peak_flops: float  # bfloat16, dense
    peak_bandwidth: float  # bytes/s to its memory


# memory: what XLA:TPU reports as the limit; GPUs: 95 % of what nvidia-smi shows, the largest part
# that XLA_PYTHON_CLIENT_MEM_FRACTION should be set to
CHIPS = {
    "TPU v4": Chip("v4", 31.75, 275e12, 1.228e12),  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": Chip("v5e", 15.75, 197e12, 0.819e12),  # cloud.google.com/tpu/docs/v5e
    "TPU v5": Chip("v5p", 95.74, 459e12, 2.765e12),  # cloud.google.com/tpu/docs/v5p
    "TPU v6 lite": Chip("v6e", 31.25, 918e12, 1.64e12),  # cloud.google.com/tpu/docs/v6e
    "H100": Chip("H100-80", 75.6, 989e12, 3.35e12),  # NVIDIA H100 SXM data sheet
    "H200": Chip("H200", 133.4, 989e12, 4.8e12),  # NVIDIA H200 data sheet
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One program on one chip. Bytes per chip."""

    program: str
    argument_bytes: int
    output_bytes: int  # without those written over donated arguments
    temporary_bytes: int
    beside_bytes: int  # of the stage, not of this program
    flops: float  # per chip
    moved_bytes: float  # per chip, at least
    compile_s: float
    contributors: list[tuple[str, int]]  # (what, bytes per chip), largest first
    refused: str = ""  # what the compiler said when it gave up for lack of memory

    @property
    def total_bytes(self) -> int:
        """The most that is on the chip while it runs."""
        parts = (self.argument_bytes, self.output_bytes, self.temporary_bytes, self.beside_bytes)
        return sum(parts)

    def floor_s(self, chip: Chip) -> float:
        """No run of this program on the chip is faster."""
        return max(self.flops / chip.peak_flops, self.moved_bytes / chip.peak_bandwidth)


def chip_of(device: Any) -> Chip | None:
    """The data sheet of a device, or None."""
    kind = device.device_kind
    exact = CHIPS.get(kind)
    return exact or next((chip for name, chip in CHIPS.items() if name in kind), None)


def estimate(
    program: Program,
    model: VLMConfig,
    mesh: Mesh,
    dtype: str,
    *,
    memory: float = math.inf,
    compiles: bool = True,
) -> tuple[Estimate, Any]:
    """(what the program needs, the shapes of its outputs); compiles, runs nothing.

    Args:
      program: from `run_programs`.
      model, mesh, dtype: of the run.
      memory: bytes of a chip; where what the stage keeps is already more, nothing is compiled.
      compiles: False = only what the stage keeps, exact and at once; temporaries count as 0.
    """
    started = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    flops = count_flops(traced.jaxpr.jaxpr, program.loop_steps) / mesh.size
    outputs = traced.out_info
    held = {name: bytes_per_chip(tree) for name, tree in program.held.items()}
    alive = sum(held.values())
    taken = bytes_per_chip(program.arguments)
    numbers = {"argument": taken, "output": 0, "temp": 0}
    refused = ""
    if not compiles or alive > memory:
        found = Estimate(
            program=program.name,
            argument_bytes=taken,
            output_bytes=0,
            temporary_bytes=0,
            beside_bytes=max(alive - taken, 0),
            flops=flops,
            moved_bytes=moved_bytes(program, model, mesh, dtype),
            compile_s=0.0,
            contributors=sorted(held.items(), key=lambda pair: -pair[1]),
            refused="not compiled: the stage keeps more than a chip has" if alive > memory else "",
        )
        return found, outputs
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # jax's error class has moved between versions
        if RESOURCE_EXHAUSTED not in str(error):
            raise
        refused, numbers["temp"] = read_refusal(str(error), taken)
    else:
        numbers = allotted_bytes(compiled.memory_analysis(), mesh.devices.flat[0].platform)
        outputs = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), outputs),
            compiled.output_shardings,
        )
    contributors = [*held.items(), ("temporaries", numbers["temp"]), ("results", numbers["output"])]
    found = Estimate(
        program=program.name,
        argument_bytes=numbers["argument"],
        output_bytes=max(numbers["output"], 0),
        temporary_bytes=numbers["temp"],
        beside_bytes=max(alive - taken, 0),
        flops=flops,
        moved_bytes=moved_bytes(program, model, mesh, dtype),
        compile_s=time.perf_counter() - started,
        contributors=sorted(contributors, key=lambda pair: -pair[1]),
        refused=refused,
    )
    return found, outputs


def allotted_bytes(stats: Any, platform: str) -> dict[str, int]:
    """ "argument", "output" (not over donated arguments) and "temp" (code among it) of a program.

    XLA:TPU takes or refuses a program by its peak: one whose `temp_size_in_bytes` and arguments add
    up to 33.6 GiB compiles for a chip of 31.25 where the peak is 28.7, and with a peak of 32.05 the
    refusal names just that. On other platforms the temporaries are one block of that size.

    Args:
      stats: `compiled.memory_analysis()`.
      platform: of the devices.
    """
    arguments = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    if platform == "tpu" and peak:
        temporaries = max(peak - arguments - outputs, 0)
    code = stats.generated_code_size_in_bytes
    return {"argument": arguments, "output": outputs, "temp": temporaries + code}


def bytes_per_chip(tree: Any) -> int:
    """What one device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * width
    return total


def moved_bytes(program: Program, model: VLMConfig, mesh: Mesh, dtype: str) -> float:
    """Bytes that must pass between a chip and its memory, see the top of the file."""
    text, width = model.text, jnp.dtype(dtype).itemsize
    tensor = mesh.shape["tensor"]
    weights = parameter_count(program.held["weights"]) * width / tensor
    layer_slot = 2 * text.kv_heads * text.head_width * width
    cache = program.cache_slots * text.depth * layer_slot / mesh.size
    decoded = decode_parameters(model) * width / tensor
    ends = bytes_per_chip(program.arguments)
    if "step" in program.name or "update" in program.name:
        ends *= 2  # the new state is written where the old one was read
    return ends + program.weight_reads * weights + program.loop_steps * (decoded + cache)


def parameter_count(tree: Any) -> int:
    """Numbers in a tree of weights."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def decode_parameters(model: VLMConfig) -> int:
    """Weights that one decoding step multiplies with: the layers and the head."""
    text = model.text
    heads = text.width * text.head_width * (2 * text.heads + 2 * text.kv_heads)
    return text.depth * (heads + 3 * text.width * text.mlp_width) + text.width * text.vocab_size


def read_refusal(message: str, argument_bytes: int) -> tuple[str, int]:
    """(the compiler's largest allocations, its temporaries) from an out-of-memory error.

    XLA:TPU says "Used 31.21G of 15.75G hbm" or, arguments among it, "the total memory required for
    HLO temporaries (31.21G)"; what is not arguments of that are temporaries.
    """
    scale = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])", message)
    total = float(used[1]) * scale[used[2]] if used else math.nan
    sizes = re.findall(
        r"Size: ([\d.]+[KMGT]?).*?(?:Operator: op_name=\"([^\"]*)\"|Shape: (\S+))",
        message,
        flags=re.S,
    )
    largest = [f"{size} {operator or shape}" for size, operator, shape in sizes[:5]]
    temporaries = 0 if math.isnan(total) else max(int(total) - argument_bytes, 0)
    return "the compiler's largest: " + ("; ".join(largest) or message[:300]), temporaries


def count_flops(jaxpr: Any, loop_steps: int) -> float:
    """2 per multiply-add of every matrix product that the jaxpr runs, on all devices together.

    Args:
      jaxpr: of a traced function.
      loop_steps: iterations of a `while_loop`, which the jaxpr does not know.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
            continue
        inner = [
            count_flops(getattr(found, "jaxpr", found), loop_steps)
            for value in parameters.values()
            for found in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(getattr(found, "jaxpr", found), "eqns")
        ]
        if not inner:
            continue
        if name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "while":
            total += loop_steps * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "pallas_call":
            total += float(np.prod(parameters["grid_mapping"].grid)) * sum(inner)
        elif name == "shard_map":
            total += parameters["mesh"].size * sum(inner)
        elif name.startswith("custom_vjp") or name.startswith("custom_jvp"):
            total += inner[0]  # the rule for the backward pass is no second run
        else:
            total += sum(inner)
    return total


def _dot_flops(equation: Any) -> float:
    left, right = (value.aval.shape for value in equation.invars)
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    shared = math.prod(left[axis] for axis in contract)
    rows = math.prod(left) // max(shared, 1)
    (_, right_contract), (_, right_batch) = equation.params["dimension_numbers"]
    columns = math.prod(
        size for axis, size in enumerate(right) if axis not in (*right_contract, *right_batch)
    )
    del batch
    return 2.0 * rows * columns * shared
