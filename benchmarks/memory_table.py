"""The table of docs/preflight.md: which size fits which machine, in the paper's run of ClevrPolicy.

    pip install 'trimpi_jax[tpu]'
    python benchmarks/memory_table.py                          # what the stages keep; a minute
    python benchmarks/memory_table.py --compile 7b:v5p-8       # and one cell through the compiler
    python benchmarks/memory_table.py --compile '.*'           # all of them; hours on two cores
    python benchmarks/memory_table.py --cells 3b:v5p-8 --compile '.*' --programs rl/update

Figures go to benchmarks/memory_table.json (a compiled program keeps its figures while the flags of
its cell stay what they were), the table to standard output. Every cell is `trimpi_jax.preflight`
with the flags that are noted with it: all weights trained, one row a device and micro-batch,
weights cut over all chips, over `tensor` as far as decoding needs it. A compiled figure with
`"by": "bound"` was taken before preflight read the compiler's peak: temporaries were the sum that
XLA:TPU reports, which is never less; the table marks it "<".
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from trimpi_jax.preflight import prepare_topology_environment

FIGURES = Path(__file__).with_suffix(".json")
SIZES = ("3b", "7b", "32b", "72b")
# machine -> topology, chips, chip whose memory counts where it is not the topology's own
MACHINES = {
    "v5e-16": ("v5e:4x4", 16, ""),
    "v6e-16": ("v6e:4x4", 16, ""),
    "v5p-8": ("v5p:2x2x1", 4, ""),
    "v5p-64": ("v5p:2x4x4", 32, ""),
    "H100-80x8": ("v5p:2x2x2", 8, "H100"),
    "H200x1": ("v5p:2x2x1", 1, "H200"),
    "H100-80x1": ("v5p:2x2x1", 1, "H100"),
}
CELLS = [(size, machine) for machine in list(MACHINES)[:6] for size in SIZES]
CELLS = [*sorted(CELLS, key=lambda cell: SIZES.index(cell[0])), ("3b", "H100-80x1")]
ROOM = 0.8  # of a chip: a step that takes at least this gets bfloat16 moments, decoding more tensor
STEPS = ("vm_cpt/step 3328", "rl/update 384")
DECODING = "rl/aware decode"
PROGRAMS = (*STEPS, DECODING)


def flags_of(size: str, machine: str, moments: str, tensor: int) -> list[str]:
    """The flags of `trimpi_jax.preflight` for a cell."""
    topology, chips, stand_in = MACHINES[machine]
    flags = ["--config", f"configs/qwen2_5_vl.py:size={size}", "--topology", topology]
    if stand_in:
        flags += ["--chips", str(chips), "--stand_in_for", stand_in]
    if tensor > 1:
        flags.append(f"--config.mesh.tensor={tensor}")
    for stage in ("vm_cpt", "rl") if moments != "float32" else ():
        flags.append(f"--config.{stage}.moment_dtype={moments}")
    return flags


def preflight(flags: list[str], only: str) -> dict:
    """What the door writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "trimpi_jax.preflight", *flags, "--examples", "0"]
        command += ["--only", only, "--json", str(path)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if not path.is_file():
            raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[-2000:]}")
        return json.loads(path.read_text())


def state_row(size: str, machine: str) -> dict:
    """What the stages keep on a chip, with the moments and mesh the row needs; compiles nothing."""
    from trimpi_jax.models.releases import RELEASES

    chips = MACHINES[machine][1]
    heads = RELEASES[size].text.kv_heads
    degrees = [degree for degree in (1, 2, 4, 8) if heads % degree == 0 and chips % degree == 0]
    records = []
    for moments in ("float32", "bfloat16"):
        for tensor in degrees:
            record = account(size, machine, moments, tensor)
            needs = max(*record["least"].values(), record["kept"][DECODING])
            if needs <= ROOM * record["memory_bytes"]:
                return record
            records.append((needs, tensor, record))
    return min(records, key=lambda one: one[:2])[2]


def account(size: str, machine: str, moments: str, tensor: int) -> dict:
    """One setting of a row, added up from shapes and shardings."""
    from configs import qwen2_5_vl
    from trimpi_jax.models.releases import RELEASES
    from trimpi_jax.preflight import find_devices
    from trimpi_jax.sharding import make_mesh
    from trimpi_jax.stages.estimate import CHIPS, bytes_per_chip, chip_of
    from trimpi_jax.stages.programs import run_programs

    topology, chips, stand_in = MACHINES[machine]
    devices, _ = find_devices(topology, chips if stand_in else 0)
    chip = CHIPS[stand_in] if stand_in else chip_of(devices[0])
    assert chip is not None
    mesh = make_mesh(1, -1, tensor, devices)
    config = qwen2_5_vl.get_config(f"size={size}")
    for stage in ("vm_cpt", "rl"):
        config[stage].moment_dtype = moments
    kept, least = {}, {}
    for one in run_programs(config, RELEASES[size], mesh, RELEASES[size].text.vocab_size):
        if one.name not in PROGRAMS:
            continue
        kept[one.name] = sum(bytes_per_chip(tree) for tree in one.held.values())
        if one.name in STEPS:
            weights = bytes_per_chip(one.held["weights"])  # float32
            rows = 128 if one.name == STEPS[0] else 32
            parts = max(rows * tensor // chips, 1)
            # weights and gradients in bfloat16; float32 sums where there are parts to add
            least[one.name] = kept[one.name] + weights + (weights if parts > 1 else 0)
    return {
        "flags": flags_of(size, machine, moments, tensor),
        "moments": moments,
        "tensor": tensor,
        "memory_bytes": chip.memory_gib * 2**30,
        "kept": kept,
        "least": least,
    }


def compile_row(record: dict, programs: str) -> dict:
    """The programs of a row, those that match, through the compiler."""
    names = [name for name in PROGRAMS if re.search(programs, name)]
    figures = preflight(record["flags"], "|".join(names))
    found = {one["program"]: one for one in figures["programs"]}
    compiled = record.get("compiled", {}) | found
    return record | {"compiled": compiled, "date": str(datetime.date.today())}


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def table(figures: dict) -> list[str]:
    """Markdown; bytes per chip in GiB."""
    lines = [
        "| model | machine | GiB a chip | moments | tensor | VM-CPT keeps | at least | compiled |"
        " update keeps | at least | compiled | decoding keeps | compiled | fits | compiled for |",
        "|" + "---|" * 15,
    ]
    for size, machine in CELLS:
        topology, _, stand_in = MACHINES[machine]
        row = figures.get(f"{size}:{machine}")
        if row is None:
            continue
        memory, compiled = row["memory_bytes"], row.get("compiled", {})
        cells, totals = [], []
        for program in PROGRAMS:
            one = compiled.get(program)
            totals.append(one["total_bytes"] if one else None)
            cells.append(gib(row["kept"][program]))
            if program in row["least"]:
                cells.append(gib(row["least"][program]))
            cells.append(f"{'< ' if one.get('by') else ''}{gib(totals[-1])}" if one else "-")
        known = [*row["least"].values(), row["kept"][DECODING]]
        known += [total for total in totals if total]
        complete = "yes" if all(totals) else "not refused"
        verdict = "no" if max(known) > memory else complete
        source = topology if any(totals) else "-"
        if any(totals) and stand_in:
            source += ", in its place"
        lines.append(
            f"| {size.upper()} | {machine} | {gib(memory)} | {row['moments']} | "
            f"{row['tensor']} | "
            f"{' | '.join(cells)} | {verdict} | {source} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", default="", help="regular expression over size:machine")
    parser.add_argument("--programs", default="", help="regular expression over their names")
    parser.add_argument("--cells", default="", help="regular expression: leave the others alone")
    parser.add_argument("--only_print", action="store_true")
    options = parser.parse_args()
    prepare_topology_environment(MACHINES["v5e-16"][0])
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for size, machine in CELLS if not options.only_print else ():
        cell = f"{size}:{machine}"
        if options.cells and not re.fullmatch(options.cells, cell):
            continue
        old, figures[cell] = figures.get(cell, {}), state_row(size, machine)
        if old.get("compiled") and old["flags"] == figures[cell]["flags"]:
            kept = {name: one for name, one in old["compiled"].items() if name in PROGRAMS}
            figures[cell] |= {"compiled": kept, "date": old["date"]}
        least = max(figures[cell]["least"].values())
        wanted = options.compile and re.fullmatch(options.compile, cell)
        if wanted and least <= figures[cell]["memory_bytes"]:
            figures[cell] = compile_row(figures[cell], options.programs)
        FIGURES.write_text(json.dumps(figures, indent=1))
        print(cell, "done", file=sys.stderr, flush=True)
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
