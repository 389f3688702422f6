r"""The door of preflight: does this run fit, before anything is allocated?

    python -m trimpi_jax.preflight --config configs/nano.py
    python -m trimpi_jax.preflight --config configs/qwen2_5_vl.py:size=7b --topology v5p:2x2x1

Compiles every program of the run for this machine's devices, or for a TPU that is not here (then
`libtpu` must be installed, and nothing else of a TPU), and prints what each needs. Exit status 1
when one does not fit.

Next: trimpi_jax/stages/programs.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from trimpi_jax.io.flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/nano.py", "recipe, e.g. configs/nano.py:method=trimpi_poro_grpo"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "a TPU to compile for, e.g. v5p:2x2x4 (GENERATION:CHIPS), instead of this host"
)
_MODEL = flags.DEFINE_string(
    "model", "", "3b, 7b, 32b, 72b or a folder with config.json; config.model_dir or size if absent"
)
_ONLY = flags.DEFINE_string("only", "", "a regular expression: programs whose names match")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 32, "examples to draw from the config's data for the padding of buckets; 0 = none"
)
_JSON = flags.DEFINE_string("json", "", "a file to write the figures to")
_STAND_IN = flags.DEFINE_string(
    "stand_in_for",
    "",
    "a chip that cannot be compiled for here, e.g. H100: bytes from the topology's compiler,"
    " compared with this chip's memory and peaks; an approximation, and said so",
)
_COMPILE = flags.DEFINE_bool(
    "compile", True, "--nocompile adds up only what the stages keep: exact, and at once"
)
_CHIPS = flags.DEFINE_integer("chips", 0, "use only so many chips of the topology; 0 = all")


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you mean --config.KEY=VALUE?")
    if _TOPOLOGY.value:
        prepare_topology_environment(_TOPOLOGY.value)
    try:
        fits = run(_CONFIG.value)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(0 if fits else 1)


def prepare_topology_environment(topology: str) -> None:
    """Tells JAX and libtpu, before either is imported, that no TPU is attached."""
    if not re.fullmatch(r"v\d+\w?:\d+(x\d+){1,2}", topology):
        sys.exit(f"--topology is GENERATION:CHIPS such as v5e:4x4 or v5p:2x2x4, got '{topology}'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or libtpu asks the cloud for this host's metadata
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # of no importance, but wanted
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU, so nothing to lock


def run(config: Any) -> bool:
    """Compile and print everything; True when all of it fits."""
    import jax  # only now: the environment above must be set first

    from trimpi_jax.io.progress import Progress
    from trimpi_jax.sharding import make_mesh
    from trimpi_jax.stages.estimate import CHIPS, chip_of, estimate
    from trimpi_jax.stages.programs import run_programs
    from trimpi_jax.stages.run_settings import execution

    if config.get("kind") == "nano_base":
        raise ValueError("preflight is for runs that internalize a policy; nano_base fits anywhere")
    progress = Progress()
    devices, platform = find_devices(_TOPOLOGY.value, _CHIPS.value)
    chip = chip_of(devices[0])
    if _STAND_IN.value:
        if _STAND_IN.value not in CHIPS:
            raise ValueError(f"--stand_in_for {_STAND_IN.value}: there are {sorted(CHIPS)}")
        chip = CHIPS[_STAND_IN.value]
    model, source = find_model(_MODEL.value or config.model_dir or config.get("size", ""))
    config = with_sizes(config, model, source)
    model = execution(model, config, platform)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    vocabulary = model.text.vocab_size
    memory = chip.memory_gib * 2**30 if chip else local_memory_bytes(devices[0])
    where = f"{len(devices)} x {chip.name if chip else devices[0].device_kind}"
    if _STAND_IN.value:
        where += f" (bytes as compiled for {_TOPOLOGY.value}: an approximation)"
    progress.say(
        f"{source}: {parameters_of(model) / 1e9:.2f} billion parameters; {where}, "
        f"{memory / 2**30:.1f} GiB each; mesh {dict(mesh.shape)}; attention {model.attention}"
    )
    found = []
    with jax.set_mesh(mesh):
        programs = run_programs(config, model, mesh, vocabulary)
        outputs = None
        while True:
            try:
                program = programs.send(outputs)
            except StopIteration:
                break
            if _ONLY.value and not re.search(_ONLY.value, program.name):
                outputs = None
                continue
            one, outputs = estimate(
                program, model, mesh, config.dtype, memory=memory, compiles=_COMPILE.value
            )
            found.append(one)
            progress.say(line(one, memory))
    progress.say("bytes per chip")
    for text in table(found, chip, memory):
        progress.say(text)
    too_large = [one for one in found if one.refused or one.total_bytes > memory]
    for one in too_large:
        progress.say(explain(one, memory))
        progress.say(f"  what takes less: {', '.join(remedies(config, one))}")
    if _EXAMPLES.value:
        for text in padding(config, model, source, _EXAMPLES.value):
            progress.say(text)
    if _JSON.value:
        record = {"where": where, "memory_bytes": memory, "model": source}
        record["programs"] = [
            dataclasses.asdict(one)
            | {"total_bytes": one.total_bytes, "floor_s": one.floor_s(chip) if chip else None}
            for one in found
        ]
        Path(_JSON.value).write_text(json.dumps(record, indent=1))
    if not found:
        raise ValueError(f"--only '{_ONLY.value}' matches no program of this run")
    if not _COMPILE.value:
        progress.say("nothing was compiled: temporaries are not counted")
    verdict = f"{len(too_large)} of {len(found)} programs do not fit" if too_large else "all fit"
    progress.say(f"{len(found)} programs, {sum(one.compile_s for one in found):.0f} s: {verdict}")
    return not too_large


def find_devices(topology: str, chips: int) -> tuple[list[Any], str]:
    """(devices, platform) of this machine, or of a TPU that is not here.

    Raises:
        ValueError: an unknown topology, libtpu is absent, or fewer chips than asked for.
    """
    import jax
    from jax.experimental import topologies

    if topology:
        try:
            import libtpu  # noqa: F401  # pyright: ignore - what compiles for a TPU
        except ImportError:
            raise ValueError(
                "--topology needs libtpu, the compiler for TPUs, which runs on any x86 Linux host:"
                " pip install 'trimpi_jax[tpu]'"
            ) from None
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except Exception as error:
            raise ValueError(f"--topology {topology}: {str(error).splitlines()[0]}") from error
        devices, platform = list(described.devices), "tpu"
    else:
        devices, platform = jax.devices(), jax.default_backend()
    if chips > len(devices):
        raise ValueError(f"--chips {chips}, but there are {len(devices)}")
    return devices[: chips or None], platform


def find_model(name: str) -> tuple[Any, str]:
    """(VLMConfig, what it is) from a released size or a folder with config.json; reads no weight.

    Raises:
        ValueError: neither.
    """
    from trimpi_jax.models.hf_weights import read_config
    from trimpi_jax.models.releases import RELEASES
    from trimpi_jax.stages.model_files import model_folder

    if name.lower() in RELEASES:
        return RELEASES[name.lower()], f"Qwen2.5-VL-{name.upper()}"
    folder = model_folder(name)
    if (folder / "config.json").is_file():
        return read_config(folder), str(folder)
    raise ValueError(f"'{name}' is neither a folder with config.json nor one of {list(RELEASES)}")


def parameters_of(model: Any) -> int:
    """Numbers in the weights."""
    from trimpi_jax.models import vlm
    from trimpi_jax.stages.estimate import parameter_count

    return parameter_count(vlm.param_shapes(model))


def local_memory_bytes(device: Any) -> float:
    """What a local device of unknown make has; for a CPU, the memory of the machine."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def line(one: Any, memory: float) -> str:
    """One program, as soon as it is compiled."""
    state = "does not fit" if one.refused or one.total_bytes > memory else "fits"
    return f"  {one.program}: {size(one.total_bytes)} a chip, {state} ({one.compile_s:.0f} s)"


def table(found: list[Any], chip: Any, memory: float) -> list[str]:
    """All programs side by side, as lines of plain text."""
    head = "program|arguments|results|temporary|beside|total|of chip|TFLOP|floor|compile"
    rows: list[list[str]] = [list(head.split("|"))]
    for one in found:
        sizes = (one.argument_bytes, one.output_bytes, one.temporary_bytes, one.beside_bytes)
        rows.append(
            [
                one.program,
                *map(size, (*sizes, one.total_bytes)),
                f"{100 * one.total_bytes / memory:.0f} %",
                f"{one.flops / 1e12:.3g}",
                f"{1000 * one.floor_s(chip):.1f} ms" if chip else "-",
                f"{one.compile_s:.0f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def explain(one: Any, memory: float) -> str:
    """What is large in a program that does not fit."""
    largest = ", ".join(f"{what} {size(count)}" for what, count in one.contributors[:5])
    text = f"{one.program} needs {size(one.total_bytes)} of {size(memory)} a chip: {largest}"
    return f"{text}\n  {one.refused}" if one.refused else text


def remedies(config: Any, one: Any) -> list[str]:
    """Options of a program's stage that are not yet what takes the least, the mildest first."""
    stage, _, what = one.program.partition("/")
    section = config.get(stage, {})
    found = []
    if re.match(r"step|update|score", what):
        if section["micro_batches"]:
            found.append(f"--config.{stage}.micro_batches=0 (one row a device at a time)")
        if config.remat != "full":
            found.append("--config.remat=full")
        if section["moment_dtype"] != "bfloat16" and section["trainable"] != "lora":
            found.append(f"--config.{stage}.moment_dtype=bfloat16")
    elif stage == "rl":
        found.append(f"fewer --config.rl.sample_prompts than {section['sample_prompts']}")
    elif stage == "evaluate":
        found.append(f"fewer --config.eval.rows than {config.eval.rows}")
    if config.mesh.fsdp == 1:
        found.append("--config.mesh.data=1 --config.mesh.fsdp=-1 (weights and state in parts)")
    found.append("more --config.mesh.tensor")
    if re.match(r"step|update", what) and section["trainable"] == "all":
        found.append(f"--config.{stage}.trainable=all_but_vision")
    return [*found, "more chips"]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def with_sizes(config: Any, model: Any, source: str) -> Any:
    """The config with its "auto" sizes chosen from the data, as the run itself will choose them.

    Raises:
        ValueError: the model's folder has no tokenizer to measure the data with.
    """
    from data_pipelines.build import DATASETS, make_settings
    from trimpi_jax.models.processor import load_processor
    from trimpi_jax.stages.auto_sizes import fill_auto_sizes, has_auto_sizes

    splits: Any = {}
    processor: Any = None
    if has_auto_sizes(config):
        if not (Path(source) / "tokenizer.json").is_file():
            raise ValueError(
                f"sizes are chosen from the data, but {source} has no tokenizer to measure it with;"
                " write numbers, e.g. --config.row_buckets=320,4096, or name a model folder"
            )
        options = config.data.to_dict()
        name = options.pop("dataset")
        splits = DATASETS[name].make_splits(make_settings(name, options), lambda done, total: None)
        processor = load_processor(Path(source), model)
    return fill_auto_sizes(config, splits, processor)


def padding(config: Any, model: Any, source: str, count: int) -> list[str]:
    """Lines that say which buckets the config's data falls into, and how much is padding."""
    from trimpi_jax.stages.padding import measure_padding

    if not (Path(source) / "tokenizer.json").is_file():
        return [f"padding: unknown, {source} has no tokenizer to measure the data with"]
    return [
        f"padding, {name}: {share}" for name, share in measure_padding(config, model, source, count)
    ]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
