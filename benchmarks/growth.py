"""The table of docs/growth.md: what more chips bring, for four programs of the paper's run on v5p.

    python benchmarks/growth.py                            # the table; minutes, needs no TPU
    pip install 'trimpi_jax[tpu]'
    python benchmarks/growth.py --compile 3b:vm_cpt:16     # a cell through XLA:TPU, to check it

A step is bounded by three things that can go on at the same time: products (counted in the traced
program), bytes between a chip and its memory (arguments, weights once a pass, caches), bytes that
a chip receives over its links. The last is a formula of the shardings, `link_bytes`; `--compile`
reads the collectives, with the trip counts of the loops around them, out of the program that
XLA:TPU makes, and puts both side by side. Nothing here has run on a TPU: these are floors.

Figures go to benchmarks/growth.json, the tables to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_suffix(".json")
SIZES = ("3b", "7b", "72b")
TOPOLOGIES = {
    4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4",
    64: "v5p:4x4x4", 128: "v5p:4x4x8", 256: "v5p:4x8x8",
}  # fmt: skip
CHIP = "TPU v5"
# cloud.google.com/tpu/docs/v5p: 4,800 Gbit/s a chip between chips, both directions together; what a
# chip receives is half of that
LINK_BYTES_S = 4800e9 / 8 / 2
BASE = 16  # chips that the programs are traced for
LEAST_TENSOR = {"3b": 1, "7b": 1, "72b": 4}  # so much that the copy that decodes fits a chip
LOGIT_TOKENS = 2048  # of a device, whose logits are computed at a time
AT_ONCE = 32  # prompts of the program of decoding: config.rl.sample_prompts
ROOM = 0.8  # of a chip's memory for what a stage keeps; the rest is for activations


@dataclasses.dataclass(frozen=True)
class Kind:
    """A program, and how its batch is cut."""

    stage: str
    program: str
    rows: int  # of a batch: no more chips can have a row each
    targets: int = 0  # tokens of a row whose logits are computed


KINDS = {
    "vm_cpt": Kind("vm_cpt", "vm_cpt/step 3328", 128, 3328),
    "cot_sft": Kind("cot_sft", "cot_sft/step 768", 64, 768),
    # of one view, all prompts of an RL step, as many at a time as memory has room for
    "decode": Kind("rl", "rl/aware decode", 384),
    "update": Kind("rl", "rl/update 384", 32, 16 * 384),
}
SCORE = {"score": Kind("rl", "rl/score 384", 32, 16 * 384)}  # a pass forward: quick to compile


@dataclasses.dataclass(frozen=True)
class Layout:
    """How chips are used: N = data x fsdp x tensor; what is in `idle` only repeats the work."""

    chips: int
    tensor: int
    micro_batches: int  # or rounds of sampling

    @property
    def batch_devices(self) -> int:
        """Devices over which rows are cut."""
        return self.chips // self.tensor


def choose_layout(kind: Kind, chips: int, heads: int, least_tensor: int) -> Layout | None:
    """The least `tensor` with which every device has rows; None: more chips than can work."""
    for tensor in (1, 2, 4, 8):
        devices = chips // tensor
        if tensor < least_tensor or heads % tensor or chips % tensor or kind.rows % devices:
            continue
        return Layout(chips, tensor, kind.rows // devices)
    return None


def make_programs(size: str, whats: Sequence[str], mesh: Any) -> tuple[dict[str, Any], Any, Any]:
    """(program by name of its kind, model, config) of the paper's run; nothing is compiled.

    One row a device and micro-batch, as the config says.
    """
    import jax

    from configs import qwen2_5_vl
    from trimpi_jax.models.releases import RELEASES
    from trimpi_jax.stages.programs import run_programs
    from trimpi_jax.stages.run_settings import execution

    config = qwen2_5_vl.get_config(f"size={size}")
    if size == "72b":
        for stage in config.stages:
            config[stage].moment_dtype = "bfloat16"
    model = execution(RELEASES[size], config, "tpu")
    wanted, found = {(KINDS | SCORE)[what].program: what for what in whats}, {}
    with jax.set_mesh(mesh):
        programs = run_programs(config, model, mesh, model.text.vocab_size)
        program = next(programs)
        while len(found) < len(wanted):
            if program.name in wanted:
                found[wanted[program.name]] = program
            if len(found) < len(wanted):
                program = programs.send(None)
    return found, model, config


def link_bytes(kind: Kind, model: Any, layout: Layout, program: Any) -> dict[str, float]:
    """Bytes that a chip receives over its links in one step, by reason.

    Weights are cut over fsdp x tensor; a layer is gathered over fsdp (in bfloat16) where it is
    used: forward, and again backward, where it is computed again (remat). Gradients are added and
    cut over fsdp. The output matrix is gathered again for every block of logits. `tensor` adds two
    sums of activations a layer each way.
    """
    text, tensor, devices = model.text, layout.tensor, layout.batch_devices
    share = (devices - 1) / devices
    from trimpi_jax.stages.estimate import parameter_count

    weights = 2.0 * parameter_count(program.held["weights"]) / tensor
    around = 2 * (tensor - 1) / tensor  # of an all-reduce
    if kind.program == "rl/aware decode":
        rows = kind.rows * 8 / devices  # completions of the view, of all rounds
        sums = program.loop_steps * 2 * text.depth * rows * text.width * 2
        return {"sums of activations": sums * around}
    tokens = program.tokens / devices  # of all micro-batches
    sums = text.depth * tokens * text.width * 2
    passes = layout.micro_batches
    again = math.ceil(kind.targets / LOGIT_TOKENS) - 1
    gathered = weights + again * 2.0 * text.vocab_size * text.width / tensor
    if kind.program == "rl/score 384":  # forward only
        gathers = passes * gathered * share
        return {"gathers": gathers, "sums of activations": 2 * sums * around}
    gathers = 2 * passes * gathered * share
    adds = passes * weights * share if kind.stage != "cot_sft" else 0.0
    return {"gathers": gathers, "gradients": adds, "sums of activations": 6 * sums * around}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program."""

    kind: str
    sent_bytes: int  # of its operands, on a chip
    group: int  # chips that take part
    trips: tuple[int, ...]  # of the loops around it, outermost first; 0 = not known

    def received(self, loop_steps: int) -> float:
        """Bytes that a chip receives, all trips together."""
        times = math.prod(trip or loop_steps for trip in self.trips)
        others = (self.group - 1) / self.group
        each = {
            "all-gather": self.sent_bytes * (self.group - 1),
            "reduce-scatter": self.sent_bytes * others,
            "all-reduce": 2 * self.sent_bytes * others,
            "all-to-all": self.sent_bytes * others,
            "collective-permute": self.sent_bytes,
        }[self.kind]
        return times * each


COLLECTIVES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\]")
WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "token": 0}


def read_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, from its text (`compiled.as_text()`)."""
    computations, entry = split_computations(text)
    sizes = {name: size for lines in computations.values() for name, size in _sizes(lines)}
    found: list[Collective] = []

    def walk(name: str, trips: tuple[int, ...], is_scatter: bool) -> None:
        for line in computations.get(name, ()):
            match = INSTRUCTION.match(line)
            opcode = OPCODE.search(match[2]) if match else None
            if match is None or opcode is None:
                continue
            kind = re.fullmatch(rf"({COLLECTIVES})(-start)?", opcode[1])
            if kind:
                operands = match[2][opcode.end() :].split(")")[0]
                sent = sum(sizes.get(one, 0) for one in re.findall(r"%([\w.\-]+)", operands))
                what = "reduce-scatter" if is_scatter else kind[1]
                found.append(Collective(what, sent, _group(line), trips))
            elif opcode[1] == "while":
                condition = re.search(r"condition=%([\w.\-]+)", line)
                body = re.search(r"body=%([\w.\-]+)", line)
                assert condition and body
                runs = _trips(computations[condition[1]], computations[body[1]])
                walk(body[1], (*trips, runs), False)
            else:
                for called in re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", line):
                    walk(called, trips, is_scatter or called.startswith("all-reduce-scatter"))
                for called in re.findall(r"branch_computations=\{([^}]*)\}", line):
                    walk(called.split(",")[0].strip(" %"), trips, False)

    walk(entry, (), False)
    return found


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(name -> lines, name of the entry) of a module's text."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        if head:
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # a kernel's text may have lines of its own that begin so
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _sizes(lines: list[str]) -> list[tuple[str, int]]:
    found = []
    for line in lines:
        match = INSTRUCTION.match(line)
        opcode = OPCODE.search(match[2]) if match else None
        if match and opcode:
            found.append((match[1], sum(map(_bytes, SHAPE.findall(match[2][: opcode.start()])))))
    return found


def _bytes(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    digits = re.search(r"\d+", dtype)
    width = WIDTHS.get(dtype, int(digits[0]) // 8 if digits else 0)
    return width * math.prod(int(size) for size in dims.split(",") if size)


def _group(line: str) -> int:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 2  # a permute has pairs


def _trips(condition: list[str], body: list[str]) -> int:
    """How often a loop runs: to a constant, from 0, in steps of what its body adds; 0 = not known.

    A product that XLA:TPU cuts into rounds (its operand goes around a ring) is such a loop, too,
    often with two rounds in a body.
    """
    limits = [re.search(r"[su]32\[\][^=]* constant\((\d+)\)", line) for line in condition]
    known = [int(limit[1]) for limit in limits if limit]
    if len(known) != 1:
        return 0
    counter = next(
        filter(None, (re.search(r"get-tuple-element\(.*index=(\d+)", line) for line in condition)),
        None,
    )
    defined = {match[1]: match[2] for line in body if (match := INSTRUCTION.match(line))}
    root = next((line for line in body if "ROOT" in line), "")
    results = re.findall(r"%([\w.\-]+)", root.split(" tuple(")[-1].split(")")[0])
    step = 0
    if counter and int(counter[1]) < len(results):
        step = _added(results[int(counter[1])], defined)
    return -(-known[0] // (step or 1))


def _added(name: str, defined: dict[str, str]) -> int:
    """Σ of the constants in a chain of additions."""
    text = defined.get(name, "")
    constant = re.search(r" constant\((\d+)\)", text)
    if constant:
        return int(constant[1])
    terms = re.search(r" add\(([^)]*)\)", text)
    if not terms:
        return 0
    return sum(_added(one, defined) for one in re.findall(r"%([\w.\-]+)", terms[1]))


def compile_cell(size: str, what: str, chips: int) -> dict[str, Any]:
    """A cell through XLA:TPU: its collectives by kind, beside what the formula says."""
    import jax

    from trimpi_jax.models.releases import RELEASES
    from trimpi_jax.preflight import find_devices
    from trimpi_jax.sharding import make_mesh

    kind = (KINDS | SCORE)[what]
    devices, _ = find_devices(TOPOLOGIES[chips], 0)
    layout = choose_layout(kind, chips, RELEASES[size].text.kv_heads, LEAST_TENSOR[size])
    assert layout is not None, "more chips than rows"
    mesh = make_mesh(1, -1, layout.tensor, devices)
    programs, model, _ = make_programs(size, [what], mesh)
    program = programs[what]
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = program.function.trace(*program.arguments).lower().compile()
    return describe(compiled.as_text(), kind, model, layout, program) | {
        "compile_s": time.perf_counter() - started,
        "xla_bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
    }


def describe(text: str, kind: Kind, model: Any, layout: Layout, program: Any) -> dict[str, Any]:
    """What a compiled program says about its collectives."""
    by_kind: dict[str, float] = {}
    for one in read_collectives(text):
        received = one.received(program.loop_steps)
        by_kind[one.kind] = by_kind.get(one.kind, 0.0) + received
    return {
        "tensor": layout.tensor,
        "micro_batches": layout.micro_batches,
        "collectives": by_kind,
        "formula": link_bytes(kind, model, layout, program),
        "date": str(datetime.date.today()),
    }


def choose_at_once(kind: Kind, layout: Layout, most: float) -> int:
    """Prompts to sample at a time: the most that memory has room for, the least if it has none."""
    fitting = [
        count
        for count in range(layout.batch_devices, kind.rows + 1, layout.batch_devices)
        if kind.rows % count == 0
    ]
    return max([count for count in fitting if count <= most], default=fitting[0])


def count_cells(sizes: Sequence[str]) -> dict[str, Any]:
    """Every cell of the table: seconds of products, memory and links, bytes that a stage keeps.

    Traced once a size, on BASE chips. On others the products are the same in all, weights and state
    are cut over all chips, the copy that decodes over `tensor` alone, caches over rows and heads.
    """
    import jax

    from trimpi_jax.sharding import make_mesh
    from trimpi_jax.stages.estimate import (
        CHIPS,
        bytes_per_chip,
        count_flops,
        decode_parameters,
        parameter_count,
    )

    chip, cells = CHIPS[CHIP], {}
    for size in sizes:
        least = LEAST_TENSOR[size]
        mesh = make_mesh(1, -1, least, jax.devices()[:BASE])
        programs, model, _ = make_programs(size, list(KINDS), mesh)
        for what, program in programs.items():
            kind = KINDS[what]
            with jax.set_mesh(mesh):
                traced = program.function.trace(*program.arguments)
            flops = count_flops(traced.jaxpr.jaxpr, program.loop_steps)
            held = {name: bytes_per_chip(tree) for name, tree in program.held.items()}
            copy = held.pop("decode weights", 0) * least  # cut over tensor alone
            state = sum(held.values()) * BASE
            # read and, in a training step, written; the copy is read below, at every token
            ends = (1 if what == "decode" else 2) * (bytes_per_chip(program.arguments) * BASE)
            ends -= copy / least * BASE if what == "decode" else 0
            weights = 2.0 * parameter_count(program.held["weights"])
            decoded = 2.0 * decode_parameters(model)
            text = model.text
            cache = program.cache_slots * text.depth * 4.0 * text.kv_heads * text.head_width
            prompts = sum(held.get(name, 0) for name in ("batch", "free rollouts")) * BASE
            for chips in TOPOLOGIES:
                layout = choose_layout(kind, chips, text.kv_heads, least)
                if layout is None:
                    cells[f"{size}:{what}:{chips}"] = {"none": "more chips than rows"}
                    continue
                tensor, kept, times = layout.tensor, state / chips, 1.0
                if what == "decode":
                    room = ROOM * chip.memory_gib * 2**30 - copy / tensor
                    fixed = (state - prompts) / chips
                    at_once = choose_at_once(
                        kind, layout, (room - fixed) * chips / (prompts / AT_ONCE)
                    )
                    times = at_once / AT_ONCE  # as many prompts as were traced
                    layout = dataclasses.replace(layout, micro_batches=kind.rows // at_once)
                    kept = fixed + times * prompts / chips
                    rounds = layout.micro_batches
                    moved = times * (ends / chips + program.loop_steps * cache / chips)
                    moved = rounds * (moved + program.loop_steps * decoded / tensor)
                    times *= rounds
                else:
                    moved = ends / chips + 3 * layout.micro_batches * weights / tensor
                links = link_bytes(kind, model, layout, program)
                cells[f"{size}:{what}:{chips}"] = {
                    "tensor": tensor,
                    "micro_batches": layout.micro_batches,
                    "kept_bytes": kept + copy / tensor,
                    "flops": times * flops / chips,
                    "moved_bytes": moved,
                    "link_bytes": links,
                    "products_s": times * flops / chips / chip.peak_flops,
                    "memory_s": moved / chip.peak_bandwidth,
                    "links_s": sum(links.values()) / LINK_BYTES_S,
                }
            print(size, what, "done", file=sys.stderr, flush=True)
    return cells


def floor_s(cell: dict[str, Any]) -> float:
    """No step is faster: the longest of the three, were they all to overlap."""
    return max(cell["products_s"], cell["memory_s"], cell["links_s"])


def table(cells: dict[str, Any], memory_bytes: float) -> list[str]:
    """Markdown."""
    lines = [
        "| model | program | chips | tensor | parts, rounds | GiB kept | products, s | memory, s |"
        " links, s | GB over links | floor, s | bound by | of linear |",
        "|" + "---|" * 13,
    ]
    for size in SIZES:
        for what in KINDS:
            first = None
            for chips in TOPOLOGIES:
                cell = cells.get(f"{size}:{what}:{chips}")
                if cell is None:
                    continue
                if "none" in cell:
                    lines.append(f"| {size.upper()} | {what} | {chips} |" + " - |" * 9 + " rows |")
                    continue
                if cell["kept_bytes"] > ROOM * memory_bytes:
                    lines.append(
                        f"| {size.upper()} | {what} | {chips} | {cell['tensor']} | - |"
                        f" {cell['kept_bytes'] / 2**30:.1f} |" + " - |" * 6 + " memory |"
                    )
                    continue
                floor = floor_s(cell)
                first = first or chips * floor
                times = {name: cell[f"{name}_s"] for name in ("products", "memory", "links")}
                bound = max(times, key=lambda name: times[name])
                lines.append(
                    f"| {size.upper()} | {what} | {chips} | {cell['tensor']} |"
                    f" {cell['micro_batches']} | {cell['kept_bytes'] / 2**30:.1f} |"
                    f" {times['products']:.3g} | {times['memory']:.3g} | {times['links']:.3g} |"
                    f" {sum(cell['link_bytes'].values()) / 1e9:.3g} | {floor:.3g} | {bound} |"
                    f" {100 * first / (chips * floor):.0f} % |"
                )
    return lines


def checks(compiled: dict[str, Any]) -> list[str]:
    """Markdown: the formula beside the compiler, GB that a chip receives."""
    lines = [
        "| cell | tensor | gathered, compiled | added, compiled | all, compiled | all, formula |"
        " ratio |",
        "|" + "---|" * 7,
    ]
    for name, one in compiled.items():
        found, formula = one["collectives"], sum(one["formula"].values())
        gathered = found.get("all-gather", 0.0)
        added = found.get("all-reduce", 0.0) + found.get("reduce-scatter", 0.0)
        total = sum(found.values())
        ratio = f"{total / formula:.2f}" if formula else "-"
        lines.append(
            f"| {name} | {one['tensor']} | {gathered / 1e9:.1f} | {added / 1e9:.1f} |"
            f" {total / 1e9:.1f} | {formula / 1e9:.1f} | {ratio} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", default="", help="SIZE:PROGRAM:CHIPS, e.g. 3b:vm_cpt:16")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--only_print", action="store_true")
    options = parser.parse_args()
    new: dict[str, Any] = {}
    if options.compile:
        from trimpi_jax.preflight import prepare_topology_environment

        size, what, chips = options.compile.split(":")
        prepare_topology_environment(TOPOLOGIES[int(chips)])
        found = compile_cell(size, what, int(chips))
        new = {"compiled": {options.compile: found}}
    elif not options.only_print:
        os.environ["JAX_PLATFORMS"] = "cpu"  # shapes only: as many devices as there are chips
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={BASE}"
        new = {"cells": count_cells(options.sizes.split(","))}
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for name, found in new.items():
        figures[name] = figures.get(name, {}) | found
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    from trimpi_jax.stages.estimate import CHIPS

    print("\n".join(table(figures.get("cells", {}), CHIPS[CHIP].memory_gib * 2**30)))
    print("\n".join(checks(figures.get("compiled", {}))))


if __name__ == "__main__":
    main()
