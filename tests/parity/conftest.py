"""Reference models, built once per test run; their tests are skipped where torch is absent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from tests.parity.rows import LAYOUTS, Row, make_batch, make_row
from trimpi_jax.models import hf_weights
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference model and what `load_hf` made of its files, with one row of every layout."""

    model: Any
    config: VLMConfig
    params: Any
    rows: list[Row]
    batch: Batch


def _pair(tied: bool, folder) -> Pair:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.parity.hf_reference import tiny_model

    model = tiny_model(tied=tied)
    model.save_pretrained(folder)
    config, params = hf_weights.load_hf(folder)
    rows = [make_row(layout) for layout in LAYOUTS]
    batch = make_batch(rows, config)
    return Pair(model, config, jax.device_put(params), rows, jax.device_put(batch))


@pytest.fixture(scope="session")
def tied_pair(tmp_path_factory) -> Pair:
    """A model whose head is its embedding."""
    return _pair(True, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_pair(tmp_path_factory) -> Pair:
    """A model with a head of its own."""
    return _pair(False, tmp_path_factory.mktemp("untied"))


@pytest.fixture(params=["tied", "untied"])
def pair(request) -> Pair:
    """Both, one after the other."""
    return request.getfixturevalue(f"{request.param}_pair")
