"""One small random model, its batch and its logits, computed once per test run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.parity.rows import LAYOUTS, make_batch, make_row, random_params, tiny_config
from trimpi_jax.models import vlm

APPLY = jax.jit(vlm.apply, static_argnums=1)


@pytest.fixture(scope="session")
def config():
    """Tied, scanned, two blocks and two layers."""
    return tiny_config()


@pytest.fixture(scope="session")
def params(config):
    """Wide random weights."""
    return jax.device_put(random_params(config))


@pytest.fixture(scope="session")
def rows():
    """One row of every layout."""
    return [make_row(layout) for layout in LAYOUTS]


@pytest.fixture(scope="session")
def batch(rows, config):
    """All rows, padded to the longest."""
    return make_batch(rows, config)


@pytest.fixture(scope="session")
def logits(config, params, batch):
    """Logits of `batch`, numpy."""
    return np.asarray(APPLY(params, config, batch))
