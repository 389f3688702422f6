"""Flags of the doors that take a config.

Next: trimpi_jax/io/progress.py
"""

from __future__ import annotations

import sys

from absl import app


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with unknown config keys as one line instead of a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections wraps one message's repr in another's
        text = str(error.args[0]).replace("\\n", " ").replace("\n", " ").replace("\\'", "'")
        sys.exit(
            f"unknown config key {text}\nA stage's options exist only when the method runs that"
            " stage; --helpfull lists all flags."
        )
