"""The door of training: `python -m trimpi_jax.train --config configs/nano.py --workdir DIR`.

The same command on every host of a TPU slice or a Slurm job; over plain ssh with three flags more.

Next: trimpi_jax/stages/pipeline.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from trimpi_jax.io.flags import parse_flags
from trimpi_jax.io.hosts import (
    compare_hosts,
    define_start_flags,
    end_together,
    gather_facts,
    start_hosts,
)
from trimpi_jax.io.storage import is_remote

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/nano.py", "recipe, e.g. configs/nano.py:method=trimpi_poro_grpo"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; runs/<config name> by default")
_START = define_start_flags()


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you mean --config.KEY=VALUE?")
    logging.set_verbosity(logging.WARNING)  # orbax reports every file that it renames
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    try:
        if is_remote(_WORKDIR.value or ""):
            raise ValueError(
                f"--workdir is a folder, got {_WORKDIR.value}; checkpoints go to a bucket, and"
                f" results are copied there, with --config.checkpoint_dir={_WORKDIR.value}"
            )
        start = _START()
        hosts = start_hosts(start)
        with end_together(hosts, start.lost_after_s):
            if hosts.count > 1:
                facts = gather_facts(config, workdir)
                place, elsewhere = workdir.expanduser().resolve(), config.get("checkpoint_dir", "")
                compare_hosts(hosts, facts, place, start.timeout_s, elsewhere)
            from trimpi_jax.stages.pipeline import run  # heavy imports only when all is well

            run(config, workdir)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is lost, start the same command again to continue")
    except (ValueError, OSError, RuntimeError) as error:
        if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
            raise  # not the user's doing: the traceback is what helps
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
