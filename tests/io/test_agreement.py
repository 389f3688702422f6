"""Alone, agreeing is free; what several processes do is in tests/multihost."""

import pytest

from trimpi_jax.io.agreement import gather, is_first, largest, of_first


def test_one_process_agrees_with_itself():
    assert is_first()
    assert gather({"a": (1, 2)}, "place") == [{"a": (1, 2)}]
    assert largest([3, 1], "place") == [3, 1]
    assert of_first(lambda: "made", "place") == "made"
    with pytest.raises(ValueError, match="as it is"):
        of_first(lambda: int("as it is"), "place")
