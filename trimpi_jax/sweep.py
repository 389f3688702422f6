"""The door of sweeps: rows of the paper's tables, trained, compared, on one page.

    python -m trimpi_jax.sweep --sweep configs/sweeps/paper_tables.py:small --workdir runs/tables
    python -m trimpi_jax.sweep --sweep configs/sweeps/paper_tables.py:small --workdir runs/tables \
        --dry_run --only 'T2-s0'
    python -m trimpi_jax.sweep --sweep configs/sweeps/paper_tables.py:full --workdir DIR --shard 2/4

The same command goes on where a killed sweep was. Exit status: 0 all chosen runs are done, 1 some
failed (the others are done), 75 stopped and saved.

Next: trimpi_jax/sweeps/runner.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

_SWEEP = flags.DEFINE_string(
    "sweep", "configs/sweeps/paper_tables.py:small", "a file with get_sweep, and its argument"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep; runs/NAME by default")
_ONLY = flags.DEFINE_string("only", "", "runs whose name has a match of this regular expression")
_SHARD = flags.DEFINE_string("shard", "", "i/n: the part of machine i of n, from 1")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "list the runs with estimated seconds, and stop")
_PAGE_ONLY = flags.DEFINE_bool("page_only", False, "write results file and page of what there is")
_SET = flags.DEFINE_multi_string("set", [], "PATH=VALUE: a setting for all runs, e.g. rl.steps=20")


def main(argv: list[str]) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    from trimpi_jax.sweeps.plan import load_sweep, parse_changes  # heavy imports only now
    from trimpi_jax.sweeps.runner import Options, run_sweep

    try:
        sweep = load_sweep(str(_SWEEP.value))
        options = Options(
            only=str(_ONLY.value),
            shard=str(_SHARD.value),
            dry_run=bool(_DRY_RUN.value),
            page_only=bool(_PAGE_ONLY.value),
            changes=parse_changes(_SET.value or []),
        )
        root = Path(_WORKDIR.value or Path("runs") / sweep.name)
        failed = run_sweep(sweep, root, options)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is lost, start the same command again to continue")
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    app.run(main)
