r"""The door of chains of thought: a dataset in, the same dataset with generated thoughts out.

    python -m trimpi_jax.make_cot --data DIR --out DIR2 --model runs/nano/1_vm_cpt/model
    python -m trimpi_jax.make_cot --data DIR --out DIR2 --model NAME --base-url http://host/v1 \
        --mode reverse

Next: trimpi_jax/stages/make_cot.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipelines.options import add_options, summary, unknown_options

WRONG, INTERRUPTED = 2, 130  # exit statuses, as data_pipelines.build has them


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    from trimpi_jax.stages.make_cot import CotSettings, run

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m trimpi_jax.make_cot", description=summary(CotSettings), allow_abbrev=False
    )
    add_options(parser, CotSettings)
    if unknown := unknown_options(arguments, parser._option_string_actions):
        _fail("\n".join(unknown) + f"\n{parser.prog} --help lists all options", WRONG)
    options = vars(parser.parse_args(arguments))
    try:
        run(CotSettings(**options))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on with the replies it has", INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error), WRONG)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
