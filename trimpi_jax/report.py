"""The door of the report: runs side by side on one page that works offline.

    python -m trimpi_jax.report runs/nano --out report.html
    python -m trimpi_jax.report runs/nano runs/cot_sft --out both.html --gallery 100

Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, call, and turn expected errors into one readable message."""
    from trimpi_jax.io.report import GALLERY, write_report

    parser = argparse.ArgumentParser(prog="python -m trimpi_jax.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", nargs="+", type=Path, help="workdir of a run")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument(
        "--gallery",
        type=int,
        default=GALLERY,
        help=f"questions to show a run ({GALLERY}); 0 = none",
    )
    options = parser.parse_args(argv)
    try:
        write_report(options.run, options.out, gallery=options.gallery)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
