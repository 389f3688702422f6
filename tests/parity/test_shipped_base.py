"""The shipped base in transformers: the same tokens, pixels and logits, with and without images."""

import dataclasses

import numpy as np
import pytest

from tests.tiny_model import ASSETS, make_png

pytest.importorskip("torch")
from tests.parity.hf_folder import QUESTIONS, assert_same_logits, load_reference


def test_the_shipped_base():
    reference = load_reference(ASSETS)
    assert_same_logits(reference, ASSETS)
    # pictures matter, else equal logits would say nothing about how they are read
    example, aware = QUESTIONS["image"]
    other = dataclasses.replace(example, images=(make_png(9, 112, 140),))
    one, two = (reference.logits(reference.inputs(e, aware))[-1] for e in (example, other))
    assert np.abs(one - two).max() > 0.1
