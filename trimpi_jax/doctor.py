r"""The door of the doctor: what does this host see, and do all hosts agree?

    python -m trimpi_jax.doctor
    python -m trimpi_jax.doctor --config configs/nano.py --workdir /shared/run    # on every host

Starts like training (by itself on Cloud TPU, GKE and Slurm; by --coordinator, --num_processes and
--process_id over plain ssh), prints what it finds, compares with the other hosts, adds one number
per device over all of them, and ends. Exit status 1 when training would not start.

Next: trimpi_jax/io/hosts.py
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from trimpi_jax.io.flags import parse_flags
from trimpi_jax.io.hosts import (
    ROOT,
    Hosts,
    commit,
    compare_hosts,
    config_digest,
    deadline,
    define_start_flags,
    gather_facts,
    start_hosts,
    versions,
    write_problem,
)
from trimpi_jax.io.storage import probe_problem

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe to compare; none by default")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder to look at; none by default")
_START = define_start_flags()


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you mean --config.KEY=VALUE?")
    logging.set_verbosity(logging.WARNING)
    try:
        examine()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def examine() -> None:
    """Print, compare, add.

    Raises:
        ValueError, OSError: what training would refuse, too.
    """
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value).expanduser().resolve() if _WORKDIR.value else None
    timeout_s = _START().timeout_s
    hosts = start_hosts(_START())
    for name, text in describe_host(hosts, workdir):
        print(f"{name:<11}{text}")
    if config is not None:
        from trimpi_jax.sharding import make_mesh

        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        print(f"{'config':<11}{config.name}, digest {config_digest(config)}")
        print(f"{'mesh':<11}" + " ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    elsewhere = (config.get("checkpoint_dir") or "") if config is not None else ""
    facts = gather_facts(config, workdir)
    names = compare_hosts(hosts, facts, workdir, timeout_s, elsewhere)
    if hosts.count > 1:
        print(f"{'compared':<11}{hosts.count} processes agree: {', '.join(names)}")
    elif workdir and (problem := write_problem(workdir)):
        raise OSError(f"workdir {workdir} is {problem}")
    elif elsewhere and (problem := probe_problem(elsewhere)):
        raise OSError(f"--config.checkpoint_dir: {problem}")
    seconds = add_over_devices(timeout_s)
    print(f"{'sum':<11}one number per device, right on all of them, {seconds:.1f} s")
    print("all is well")


def describe_host(hosts: Hosts, workdir: Path | None) -> list[tuple[str, str]]:
    """What this host is and has, as (name, text)."""
    import jax

    device = jax.local_devices()[0]
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    each = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in stats else ""
    page = os.sysconf("SC_PAGE_SIZE")
    installed, free = (
        page * os.sysconf(name) / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    )
    lines = [
        ("host", f"{socket.gethostname()}, process id {os.getpid()}"),
        ("process", f"{hosts.process} of {hosts.count} (found: {hosts.found_by})"),
        (
            "devices",
            f"{jax.local_device_count()} x {device.device_kind} ({device.platform}{each}) here,"
            f" {jax.device_count()} in all",
        ),
        ("memory", f"{installed:.1f} GiB, {free:.1f} free; {os.cpu_count()} cores"),
        ("commit", commit(ROOT)),
        ("versions", ", ".join(f"{name} {text or '-'}" for name, text in versions().items())),
        ("clock", time.strftime("%Y-%m-%d %H:%M:%S %z")),
    ]
    if workdir:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
        space = shutil.disk_usage(existing).free / 2**30
        lines.append(("workdir", f"{workdir}, {space:.1f} GiB free"))
    return lines


def add_over_devices(timeout_s: float) -> float:
    """Σ over all devices of all hosts of (number + 1), on every device; returns seconds.

    Raises:
        RuntimeError: a wrong sum. A sum that hangs ends the process after `timeout_s`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    count = jax.device_count()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    numbers = np.arange(1, count + 1, dtype=np.float32)
    spread = jax.make_array_from_callback(
        (count,), NamedSharding(mesh, PartitionSpec("all")), lambda index: numbers[index]
    )
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    started = time.monotonic()

    def explain() -> str:
        return (
            "the sum over all devices has not come back: the hosts see each other, but their"
            " devices do not (network between accelerators, firewall, a host that hangs)"
        )

    with deadline(timeout_s, explain):
        result = add(spread)
        found = [float(np.asarray(shard.data)) for shard in result.addressable_shards]
    expected = count * (count + 1) / 2
    if any(one != expected for one in found):
        raise RuntimeError(f"the sum over {count} devices is {found}, expected {expected}")
    return time.monotonic() - started


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
