r"""Starting on several hosts: find the others, and agree with them before the first step.

    alone        one process; nothing to agree on
    by itself    Cloud TPU, GKE and Slurm say who the others are; `jax.distributed` asks them
    by flags     --coordinator=HOST:PORT --num_processes=N --process_id=I, for plain ssh

JAX would wait for a process that never comes and then abort with a stack trace; would train on with
another commit or config on one host; would write N runs into N local folders of one name. All of
that is an error here, on every host, that names who is missing or differs.

Source: jax.distributed; the key-value store of its coordination service.
Next: trimpi_jax/io/workdir_lock.py
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from trimpi_jax.io.storage import probe_problem

ROOT = Path(__file__).parents[2]  # of the clone, the image or the installed packages
SOURCE_FOLDERS = ("trimpi_jax", "data_pipelines", "configs")
COMMIT_FILE = "COMMIT"  # written where there is no .git: tpu_scripts/setup.sh, Dockerfile
PACKAGES = "jax jaxlib libtpu flax optax orbax-checkpoint grain numpy transformers".split()
# Logins to object stores refuse clocks that are minutes off; the time of a message between hosts is
# far below this.
CLOCK_TOLERANCE_S = 60.0
SHARED_FOLDER_WAIT_S = 10.0  # until a new file of another host is seen; NFS takes a few seconds


@dataclasses.dataclass(frozen=True)
class StartFlags:
    """How a process finds the others."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 300
    lost_after_s: int = 30


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of this run, this one's number, and who said so."""

    process: int
    count: int
    found_by: str


def define_start_flags() -> Callable[[], StartFlags]:
    """Defines the flags of a door that may run on several hosts; returns what reads them."""
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; with --num_processes and --process_id"
    )
    count = flags.DEFINE_integer("num_processes", None, "processes that start together")
    process = flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    timeout = flags.DEFINE_integer(
        "start_timeout_s", 300, "longest wait for the other processes, in seconds", lower_bound=1
    )
    lost = flags.DEFINE_integer(
        "lost_after_s", 30, "a process unheard of for so many seconds is gone", lower_bound=5
    )
    return lambda: StartFlags(
        coordinator.value, count.value, process.value, timeout.value, lost.value
    )


def start_hosts(start: StartFlags) -> Hosts:
    """Join the other processes; must come before anything else of JAX.

    A process that is missing after `start.timeout_s` ends this one with a message and status 1:
    JAX's own wait can only be left by ending the process.

    Raises:
        ValueError: flags that do not belong together.
    """
    import jax

    given = [start.coordinator, start.num_processes, start.process_id]
    if any(value is not None for value in given):
        check_start_flags(start)
        assert start.num_processes is not None and start.process_id is not None
        if start.num_processes == 1:
            return Hosts(0, 1, "flags")
        _initialize(start, "flags")
        return Hosts(start.process_id, start.num_processes, "flags")
    found = find_cluster(os.environ)
    if not found:
        return Hosts(0, 1, "alone")
    _initialize(start, found)
    return Hosts(jax.process_index(), jax.process_count(), found)


def check_start_flags(start: StartFlags) -> None:
    """Raises ValueError when the three flags do not belong together."""
    missing = [
        f"--{name}"
        for name in ("coordinator", "num_processes", "process_id")
        if getattr(start, name) is None
    ]
    if missing:
        raise ValueError(
            "--coordinator, --num_processes and --process_id belong together; missing:"
            f" {', '.join(missing)}"
        )
    count, process = start.num_processes, start.process_id
    assert count is not None and process is not None
    if count < 1 or not 0 <= process < count:
        raise ValueError(
            f"--process_id={process} of --num_processes={count}: processes are numbered 0 to"
            f" {max(count - 1, 0)}"
        )
    host, _, port = str(start.coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator is HOST:PORT of process 0, got '{start.coordinator}'")


def find_cluster(environment: Mapping[str, str]) -> str:
    """The cluster that this process was started on together with others; "" when it is alone.

    JAX knows Cloud TPU, GKE and Slurm; a Slurm step of one task is alone (JAX would then show it
    one GPU of the node's).
    """
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks

    if environment.get("SLURM_NTASKS") == "1":
        return ""
    for cluster in ClusterEnv._cluster_types:
        name = cluster.name or cluster.__name__  # Kubernetes has no name there
        if name == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment:
            continue  # a pod of its own, not one of an indexed job
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return name
    return ""


def visible_devices(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of the node for a Slurm step with one task a node; None = JAX decides.

    JAX takes a Slurm task for the owner of one GPU, which is right for one task a GPU.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # "1(x2)" = one on each of two
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if tasks.split("(")[0] == "1" and "," not in tasks and count.isdigit() and int(count):
        return list(range(int(count)))
    return None


def _initialize(start: StartFlags, found_by: str) -> None:
    import jax

    # only matters where the devices are CPUs; there the default cannot cross processes
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"at {start.coordinator}" if start.coordinator else f"through {found_by}"
    print(
        f"{socket.gethostname()}: waiting up to {start.timeout_s} s for the others, found {where}",
        file=sys.stderr,
    )
    port = int(start.coordinator.rpartition(":")[2]) if start.coordinator else None
    with deadline(start.timeout_s, lambda: _explain_missing(start, port)):
        jax.distributed.initialize(
            start.coordinator,
            start.num_processes,
            start.process_id,
            local_device_ids=visible_devices(os.environ) if found_by == "slurm" else None,
            cluster_detection_method="deactivate" if start.coordinator else None,
            # its own end of waiting is an abort without a name: ours comes first
            initialization_timeout=start.timeout_s + 60,
            heartbeat_timeout_seconds=start.lost_after_s,
            shutdown_timeout_seconds=15,
        )


FAILED = "trimpi_jax/failed"  # what the first process that failed says to the others
# what the death of another process looks like from here: gloo, NCCL, the coordination service
LOST = re.compile(r"Gloo|NCCL|Socket closed|Connection (closed|reset)|UNAVAILABLE|heartbeat")
EXIT_LOST = 134  # 128 + SIGABRT, with which JAX ends a process that has lost another one
GO_ON = (
    "Nothing saved is lost: start the same command again on every host, it continues at the last"
    " checkpoint"
)
# speaks when the process that started it ends without having said "ended": also after kill -9
HERALD = "import sys; sys.stdin.read() == 'ended' or print(sys.argv[1], file=sys.stderr)"


@contextlib.contextmanager
def end_together(hosts: Hosts, lost_after_s: float) -> Iterator[None]:
    """While the body runs on several processes, none waits in silence for one that is gone.

    A process whose body raises tells the others why, and all end with status 1. One that is killed
    is noticed by JAX after `lost_after_s`, which ends the others; a helper process says what that
    means, since nothing of Python runs any more then.
    """
    if hosts.count == 1:
        yield
        return
    who = f"process {hosts.process} of {hosts.count} ({socket.gethostname()})"
    herald = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", HERALD, f"{who} has ended: it was killed, or it has"
         f" lost another one, which JAX names above. {GO_ON}"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True,
    )  # fmt: skip
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(hosts, who, herald, done), daemon=True)
    listener.start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        text = f"{type(error).__name__}: {error}"
        if LOST.search(str(error)):
            first = text.splitlines()[0]
            print(f"{who} has lost another one ({first}); JAX says which", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(2 * lost_after_s + 10)  # JAX ends this process before
            _leave(herald, f"{who} has not learnt which one it was. {GO_ON}", EXIT_LOST)
        if type(error) not in (ValueError, OSError, RuntimeError, FileNotFoundError, TimeoutError):
            traceback.print_exc()  # not the user's doing
        with contextlib.suppress(Exception):
            _client().key_value_set(FAILED, f"{who}: {text}", allow_overwrite=True)
        _leave_last(hosts, herald, text)
    finally:
        done.set()
        listener.join()  # a thread inside JAX would not survive the end of Python
        _dismiss(herald)


def _listen(hosts: Hosts, who: str, herald: subprocess.Popen[str], done: threading.Event) -> None:
    """Looks for the failure of another process, and ends this one."""
    while not done.wait(1):
        try:
            text = _client().key_value_try_get(FAILED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # process 0 is gone: JAX ends this one
        if text.startswith(who):
            return
        _leave_last(hosts, herald, f"{who} ends with {text}")


def _leave_last(hosts: Hosts, herald: subprocess.Popen[str], text: str) -> None:
    """End with status 1, process 0 after the others: they would lose the words with it."""
    print(text, file=sys.stderr, flush=True)
    time.sleep(2 if hosts.process else 10)
    _leave(herald, "", 1)


def _leave(herald: subprocess.Popen[str], text: str, status: int) -> None:
    """End now: JAX's way out would wait for the others."""
    if text:
        print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _dismiss(herald)
    os._exit(status)


def _dismiss(herald: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        herald.communicate("ended", timeout=10)


@contextlib.contextmanager
def deadline(seconds: float, explain: Callable[[], str]) -> Iterator[None]:
    """Ends the process with a message when the body takes longer: for waits that nothing can leave.

    Args:
        seconds: until then.
        explain: makes the message, at the end of the wait.
    """

    def end() -> None:
        try:
            text = explain()
        except Exception as error:
            text = f"and the reason could not be found ({error})"
        print(f"TimeoutError: after {seconds:g} s {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _explain_missing(start: StartFlags, port: int | None) -> str:
    """Who has not come, as far as this process can see."""
    general = (
        "not all processes have come. Was the command started on every host, with the same"
        " --num_processes and a --process_id of its own? Do firewalls let the coordinator's port"
        " through?"
    )
    if start.coordinator is None or port is None:
        return general
    if start.process_id == 0:
        heard = connected_to(port)
        others = f"from {', '.join(heard)}" if heard else "from nobody"
        assert start.num_processes is not None
        wanted = start.num_processes - 1
        return f"process 0 waits for {wanted} others and has heard {others}; {general}"
    host = start.coordinator.rpartition(":")[0]
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return f"process 0 does not answer at {start.coordinator} ({error}); {general}"
    return f"process 0 answers at {start.coordinator}, but others are missing; {general}"


def connected_to(port: int) -> list[str]:
    """Addresses with an open connection to a local port, from /proc; without those of its own."""
    found: collections.Counter[str] = collections.Counter()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, local, remote, state = line.split()[:4]
                if state == "01" and int(local.rpartition(":")[2], 16) == port:
                    digits = bytes.fromhex(remote.rpartition(":")[0])
                    words = (digits[at : at + 4][::-1] for at in range(0, len(digits), 4))
                    address = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                    found[address] += 1
    for own in ("127.0.0.1", "::1"):  # process 0 is connected to itself
        if found.get(own):
            found[own] -= 1
            break
    return sorted(address for address, count in found.items() for _ in range(count))


def gather_facts(config: Any, workdir: Path | None) -> dict[str, str]:
    """What must be equal on all hosts, by name; values are texts.

    Args:
        config: a ConfigDict, or None.
        workdir: whose data, if it is there already, is a part; or None.
    """
    import jax

    facts = {
        "commit": commit(ROOT),
        "source files": source_digest(ROOT),
        "python": platform.python_version(),
        **{name: version for name, version in versions().items() if version},
        "platform": jax.default_backend(),
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }
    if config is not None:
        facts |= flatten(json.loads(config.to_json()), "config")
        folder = Path(config.get("data_dir") or (workdir / "data" if workdir else ""))
        manifest = folder.expanduser() / "manifest.json"
        if manifest.is_file():
            facts["data manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    return facts


def config_digest(config: Any) -> str:
    """Sixteen hexadecimal digits that stand for a config."""
    text = json.dumps(json.loads(config.to_json()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(value: Any, path: str) -> dict[str, str]:
    """`path.key.key`: leaf, for every leaf."""
    if isinstance(value, dict) and value:
        return {
            name: leaf
            for key, below in value.items()
            for name, leaf in flatten(below, f"{path}.{key}").items()
        }
    return {path: json.dumps(value)}


def commit(root: Path) -> str:
    """The commit that runs, "-changed" when files differ from it; "unknown" without a record."""
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        try:
            head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
            changed = subprocess.check_output(
                [*git, "status", "--porcelain", "--untracked-files=no"], text=True
            )
            return f"{head}-changed" if changed else head
        except (OSError, subprocess.CalledProcessError):
            return "unknown"  # no git, or another owner's clone
    with contextlib.suppress(OSError):
        return (root / COMMIT_FILE).read_text().strip()
    return "unknown"


def source_digest(root: Path) -> str:
    """Digest of every Python file of ours: what a commit cannot tell of an edited copy."""
    digest = hashlib.sha256()
    for folder in SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed; "" = not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def compare_hosts(
    hosts: Hosts,
    facts: Mapping[str, str],
    workdir: Path | None,
    timeout_s: float,
    checkpoint_dir: str = "",
) -> list[str]:
    """Every process tells its facts and hears those of all others; returns the hosts' names.

    Args:
        hosts: from `start_hosts`.
        facts: from `gather_facts`.
        workdir: must be the same folder on all, and writable; None = not looked at.
        timeout_s: how long to wait for an answer.
        checkpoint_dir: a folder or address that every host must be able to write to; "" = none.

    Raises:
        ValueError: listing, on every host alike, every fact that differs and who differs.
        OSError: a workdir that is not shared or cannot be written to, or a checkpoint_dir.
        TimeoutError: naming the processes that did not answer.
    """
    if hosts.count == 1:
        return [socket.gethostname()]
    end = time.monotonic() + timeout_s
    _put("arrived", hosts.process, "")
    _gather("arrived", hosts.count, end)
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "clock_s": time.time(),
        "facts": dict(facts),
    }
    marker = _share_marker(hosts, workdir, end)
    own["workdir"] = look_at_folder(workdir, marker) if workdir else ""
    own["checkpoint_dir"] = probe_problem(checkpoint_dir) if checkpoint_dir else ""
    _put("facts", hosts.process, json.dumps(own))
    heard = [json.loads(text) for text in _gather("facts", hosts.count, end)]
    _put("heard", hosts.process, "")
    if workdir and hosts.process == 0:
        with contextlib.suppress(TimeoutError, OSError):
            _gather("heard", hosts.count, end)
            (workdir / marker).unlink(missing_ok=True)
    names = [one["host"] for one in heard]
    problems = describe_differences([one["facts"] for one in heard], names)
    problems += describe_clocks([one["clock_s"] for one in heard], names)
    if problems:
        raise ValueError(
            f"the {hosts.count} processes of this run differ, so nothing was started:\n  "
            + "\n  ".join(problems)
        )
    for key, rule in (
        ("workdir", f"workdir {workdir} must be one folder that all hosts see and can write to"),
        ("checkpoint_dir", "every host must be able to write to --config.checkpoint_dir"),
    ):
        refusals = [
            f"{_who(process, names)}: {one[key]}" for process, one in enumerate(heard) if one[key]
        ]
        if refusals:
            raise OSError(f"{rule}:\n  " + "\n  ".join(refusals))
    return names


def describe_differences(facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A line for every fact that is not the same everywhere, naming the odd ones out.

    Args:
        facts: per process.
        names: hosts of the processes.
    """
    lines = []
    for key in dict.fromkeys(key for one in facts for key in one):
        values = [one.get(key, "absent") for one in facts]
        by_value: dict[str, list[int]] = {}
        for process, value in enumerate(values):
            by_value.setdefault(value, []).append(process)
        if len(by_value) == 1:
            continue
        # the largest group is right; of equally large ones nobody can say
        ordered = sorted(by_value.items(), key=lambda item: -len(item[1]))
        tied = len(ordered[0][1]) == len(ordered[1][1])
        odd = ordered if tied else ordered[1:]
        parts = [
            f"{', '.join(_who(process, names) for process in processes)} has {value}"
            for value, processes in odd
        ]
        if not tied:
            parts.append(f"the other {len(ordered[0][1])} have {ordered[0][0]}")
        lines.append(f"{key}: " + "; ".join(parts))
    return lines


def describe_clocks(clocks_s: Sequence[float], names: Sequence[str]) -> list[str]:
    """A line for every clock that is far from the middle one."""
    middle = sorted(clocks_s)[(len(clocks_s) - 1) // 2]
    return [
        f"clock: {_who(process, names)} is {clock - middle:+.0f} s off; set it by NTP"
        for process, clock in enumerate(clocks_s)
        if abs(clock - middle) > CLOCK_TOLERANCE_S
    ]


def look_at_folder(workdir: Path, marker: str) -> str:
    """ "" when the folder can be written to and is the one that holds the marker, or what is wrong.

    Args:
        workdir: to look at.
        marker: name of a file that process 0 wrote; "" = it could not.
    """
    problem = write_problem(workdir)
    if problem:
        return problem
    if not marker:
        return "process 0 could not write to it"
    end = time.monotonic() + SHARED_FOLDER_WAIT_S
    while not (workdir / marker).exists():
        if time.monotonic() > end:
            return "it is not the folder that process 0 sees (a local disk?)"
        os.listdir(workdir)  # asks NFS again
        time.sleep(0.2)
    return ""


def write_problem(folder: Path) -> str:
    """ "" when files can be made in a folder (which is made, too), or why not."""
    probe = folder / f".probe-{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        found = probe.read_text()
        probe.unlink()
    except OSError as error:
        return f"not writable ({error})"
    return "" if found == "x" else "gives back something else than was written to it"


def _who(process: int, names: Sequence[str]) -> str:
    return f"process {process} ({names[process]})"


def _share_marker(hosts: Hosts, workdir: Path | None, end: float) -> str:
    """The name of a file that process 0 makes in the workdir; "" when it could not."""
    if workdir is None:
        return ""
    if hosts.process == 0:
        marker = f".start-{secrets.token_hex(6)}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / marker).touch()
        except OSError:
            marker = ""
        _put("marker", 0, marker)
    return _gather("marker", 1, end)[0]


def _client() -> Any:
    from jax._src import distributed  # the store has no public name; Orbax reaches it the same way

    return distributed.global_state.client


def _put(what: str, process: int, text: str) -> None:
    _client().key_value_set(f"trimpi_jax/start/{what}/{process}", text)


def _gather(what: str, count: int, end: float) -> list[str]:
    """What all processes have put; TimeoutError names those that have not."""
    found, missing = [], []
    for process in range(count):
        left_ms = max(1, int(1000 * (end - time.monotonic())))
        try:
            found.append(
                _client().blocking_key_value_get(f"trimpi_jax/start/{what}/{process}", left_ms)
            )
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            missing.append(process)
    if missing:
        raise TimeoutError(
            f"processes {missing} of {count} came, but then did not answer in time ({what}); their"
            " own output says why"
        )
    return found
