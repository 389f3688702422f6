"""Runs before any test: eight fake devices, strict broadcasting, exact float32 products."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests import tests.parity.rows

import jax  # noqa: E402 - the flags above must be set first
from absl import flags  # noqa: E402

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

from hypothesis import settings  # noqa: E402 - after the flags, like the imports above

# the same examples in every run, however slow the machine: a failure that nobody can repeat helps
# nobody
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
