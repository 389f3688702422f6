"""The stream: every epoch a permutation, hosts share it without overlap, a resume is exact."""

import itertools
import json

import pytest

from data_pipelines.building import write_dataset
from data_pipelines.example import Example
from data_pipelines.streaming import encode_state, make_stream, read_split, restore_state

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "data"
    examples = [Example(str(i), (), "", "") for i in range(COUNT)]
    write_dataset(folder, {"train": examples, "empty": []}, {}, shard_examples=4)
    return folder


def take(stream, batches):
    return [[int(e.example_id) for e in batch] for batch in itertools.islice(stream, batches)]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_every_epoch_is_another_permutation(folder):
    # batches of 3 do not divide 10: they run over the end of an epoch, nothing is dropped
    order = flat(take(make_stream(folder, "train", batch_examples=3, seed=0), 10))
    epochs = [tuple(order[i : i + COUNT]) for i in range(0, 30, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert tuple(range(COUNT)) not in epochs


def test_the_order_is_a_function_of_the_seed(folder):
    first = take(make_stream(folder, "train", batch_examples=5, seed=1), 4)
    assert take(make_stream(folder, "train", batch_examples=5, seed=1), 4) == first
    assert take(make_stream(folder, "train", batch_examples=5, seed=2), 4) != first


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_see_disjoint_examples_and_together_all(folder, hosts):
    whole = flat(take(make_stream(folder, "train", batch_examples=2, seed=0), 20))  # four epochs
    shares = [
        flat(
            take(
                make_stream(
                    folder,
                    "train",
                    batch_examples=2,
                    seed=0,
                    process_index=host,
                    process_count=hosts,
                ),
                20 // hosts,
            )
        )
        for host in range(hosts)
    ]
    assert {len(share) for share in shares} == {len(whole) // hosts}  # equal shares
    # dealt out like cards: host h gets every hosts-th of the one order, from the h-th on
    assert flat(zip(*shares, strict=True)) == whole
    an_epoch = flat(zip(*(share[: COUNT // hosts] for share in shares), strict=True))
    assert len(set(an_epoch)) == len(an_epoch)


@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_a_resumed_stream_reads_the_very_next_batch(folder, before):
    stream = make_stream(folder, "train", batch_examples=3, seed=5)
    take(stream, before)
    saved = json.loads(json.dumps(encode_state(stream)))  # as a checkpoint keeps it
    expected = take(stream, 8)
    resumed = make_stream(folder, "train", batch_examples=3, seed=5)
    restore_state(resumed, saved)
    assert take(resumed, 8) == expected


def test_a_stream_that_already_ran_can_be_put_back(folder):
    stream = make_stream(folder, "train", batch_examples=3, seed=5)
    saved = encode_state(stream)
    first = take(stream, 4)
    restore_state(stream, saved)
    assert take(stream, 4) == first


@pytest.mark.parametrize(
    ("split", "batch", "hosts"), [("train", 11, 1), ("train", 6, 2), ("empty", 1, 1)]
)
def test_too_few_examples_for_one_batch_are_an_error(folder, split, batch, hosts):
    with pytest.raises(ValueError, match=f"fewer than one batch of {batch} on {hosts} hosts"):
        make_stream(folder, split, batch_examples=batch, seed=0, process_count=hosts)


def test_exactly_one_batch_is_enough(folder):
    stream = make_stream(folder, "train", batch_examples=COUNT, seed=0)
    assert sorted(flat(take(stream, 1))) == list(range(COUNT))


def test_an_empty_split_reads_as_nothing(folder):
    assert list(read_split(folder, "empty")) == []
