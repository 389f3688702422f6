"""What is measured is what encoding gives; buckets hold everything and waste the least."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.example import Example, image_size
from trimpi_jax.inputs.batching import plan_buckets, round_up
from trimpi_jax.inputs.encode import encode_example, encode_prompt
from trimpi_jax.inputs.sizes import SizeReader
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.models.processor import load_processor

ASSETS = Path(__file__).parents[2] / "trimpi_jax" / "assets" / "nano"


def picture(width, height, kind="PNG", orientation=1):
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format=kind, exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def processor():
    return load_processor(ASSETS, load_hf(ASSETS)[0])


def test_measured_sizes_are_those_of_the_encoded_rows(processor):
    reader = SizeReader(processor)
    document = (
        "# Rules\n<image>\nUnless it rains: no <image>.",
        (picture(90, 60), picture(500, 40)),
    )
    for i, (width, height, turn) in enumerate([(168, 112, 1), (40, 300, 6), (31, 29, 1)]):
        example = Example(
            f"e{i}",
            (picture(width, height, "JPEG", turn), picture(57, 57)),
            "How many — and why? " * (i + 1),
            "Case 3",
            cot="I see é." * i,
            policy_name="L",
            policy_text=document[0],
            policy_images=document[1],
        )
        size = reader.measure(example)
        for view, aware in ((size.free, False), (size.aware, True)):
            row = encode_prompt(example, processor, policy_in_prompt=aware)
            assert (view.tokens, view.windows) == (len(row.tokens), len(row.images.patches))
        row = encode_example(
            example, processor, policy_in_prompt=False, with_cot=bool(i), loss_on="completion"
        )
        assert size.completion_tokens == row.loss_mask.sum()
    assert reader.measure(Example("e", (picture(9, 9),), "q", "a")).aware is None


def test_image_size_reads_the_head_only():
    assert image_size(picture(30, 20)) == (20, 30)
    assert image_size(picture(30, 20, "JPEG", 6)) == (30, 20)  # turned by a quarter
    assert image_size(picture(30, 20, "JPEG", 3)) == (20, 30)


def test_buckets_by_hand():
    assert plan_buckets([10, 10, 10, 100]) == (16, 104)
    assert plan_buckets([10, 10, 10, 100], max_buckets=1) == (104,)
    assert plan_buckets([100, 101, 102]) == (104,)
    assert plan_buckets([6, 6, 26], rounded=False) == (6, 26)
    assert plan_buckets([3000, 130]) == (136, 3008)
    assert [round_up(size) for size in (1, 8, 9, 512, 513)] == [1, 8, 16, 512, 576]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3))
@settings(max_examples=60)
def test_buckets_hold_everything_and_none_are_better(sizes, count):
    found = plan_buckets(sizes, max_buckets=count, worth=0.0, rounded=False)
    assert max(found) >= max(sizes) and len(found) <= count

    def slots(buckets):
        return sum(min(b for b in buckets if b >= size) for size in sizes)

    every = [
        (*rest, max(sizes))
        for k in range(count)
        for rest in itertools.combinations(sorted(set(sizes) - {max(sizes)}), k)
    ]
    assert slots(found) == min(map(slots, every))
