"""The stream: every epoch a permutation, hosts share it without overlap, a resume is exact."""

import itertools
import json

import pytest

from data_pipelines.building import write_dataset
from data_pipelines.example import Example
from data_pipelines.streaming import (
    StreamSource,
    encode_state,
    make_mixed_stream,
    make_stream,
    read_split,
    restore_state,
)

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


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "data"
    examples = [Example(str(100 + i), (), "", "") for i in range(6)]
    write_dataset(folder, {"train": examples}, {}, shard_examples=4)
    return folder


def mixed(folder, other, hosts=1, host=0, batch=4, seed=0, weights=(3.0, 1.0)):
    sources = [
        StreamSource(path, "train", weight)
        for path, weight in zip((folder, other), weights, strict=True)
    ]
    return make_mixed_stream(
        sources, batch_examples=batch, seed=seed, process_index=host, process_count=hosts
    )


def test_a_mixture_has_its_shares_at_every_point(folder, other):
    order = flat(take(mixed(folder, other), 30))
    for number in range(1, len(order) + 1):
        from_other = sum(i >= 100 for i in order[:number])
        assert abs(from_other - number / 4) <= 1
    # each source is still a permutation an epoch: 90 of 10 examples, 30 of 6
    mine, others = [i for i in order if i < 100], [i for i in order if i >= 100]
    assert all(sorted(mine[i : i + 10]) == list(range(10)) for i in range(0, 90, 10))
    assert all(sorted(others[i : i + 6]) == list(range(100, 106)) for i in range(0, 30, 6))
    assert len({tuple(others[i : i + 6]) for i in range(0, 30, 6)}) > 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_a_mixture_without_overlap_or_loss(folder, other, hosts):
    # 240 examples of all hosts: 180 = 18 epochs of one source, 60 = 10 epochs of the other
    shares = [
        flat(take(mixed(folder, other, hosts, host, batch=2), 120 // hosts))
        for host in range(hosts)
    ]
    everything = flat(shares)
    assert all(everything.count(i) == 18 for i in range(10))
    assert all(everything.count(i) == 10 for i in range(100, 106))
    for share in shares:  # and every host has the mixture, not one source
        assert abs(sum(i >= 100 for i in share) - len(share) / 4) <= 1


@pytest.mark.parametrize("before", [0, 2, 5])
def test_a_mixture_resumes_at_the_very_next_batch(folder, other, before):
    stream = mixed(folder, other)
    take(stream, before)
    saved = json.loads(json.dumps(encode_state(stream)))
    expected = take(stream, 6)
    resumed = mixed(folder, other)
    restore_state(resumed, saved)
    assert take(resumed, 6) == expected


def test_a_place_in_another_stream_is_refused(folder, other):
    saved = encode_state(mixed(folder, other))
    for stream in (
        mixed(folder, other, seed=1),
        mixed(folder, other, weights=(1.0, 1.0)),
        mixed(other, folder),
        make_stream(folder, "train", batch_examples=4, seed=0),
    ):
        with pytest.raises(ValueError, match="a stream of other data, seed or weights"):
            restore_state(stream, saved)
    with pytest.raises(ValueError, match="other data"):
        restore_state(mixed(folder, other), {"grain": "an older state"})
    with pytest.raises(ValueError, match="use the saved batch size and number of hosts"):
        restore_state(mixed(folder, other, batch=2), saved)


def test_a_place_holds_for_another_number_of_hosts_and_batch_size(folder):
    one = make_stream(folder, "train", batch_examples=4, seed=3)
    take(one, 3)
    saved = encode_state(one)  # 12 examples are done
    expected = flat(take(one, 3))
    hosts = [
        make_stream(folder, "train", batch_examples=3, seed=3, process_index=i, process_count=2)
        for i in range(2)
    ]
    for host in hosts:
        restore_state(host, saved)
    dealt = [flat(take(host, 2)) for host in hosts]
    assert flat(zip(*dealt, strict=True)) == expected
    with pytest.raises(ValueError, match=r"3 batches of 4 on 1 hosts.* no whole number of batches"):
        restore_state(make_stream(folder, "train", batch_examples=5, seed=3), saved)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_an_error(folder, weight):
    with pytest.raises(ValueError, match="weights above 0"):
        make_mixed_stream([StreamSource(folder, "train", weight)], batch_examples=1, seed=0)


def test_each_is_done_to_every_example(folder):
    stream = make_stream(folder, "train", batch_examples=5, seed=1, each=double_id)
    plain = make_stream(folder, "train", batch_examples=5, seed=1)
    assert list(itertools.islice(stream, 3)) == [[2 * i for i in b] for b in take(plain, 3)]


def double_id(example):
    if example.example_id == "fault":
        raise ValueError("example 'fault' cannot be encoded")
    return 2 * int(example.example_id)


@pytest.mark.timeout(120)
def test_worker_processes_change_nothing_but_the_speed(folder):
    plain = make_stream(folder, "train", batch_examples=3, seed=1, each=double_id)
    expected = list(itertools.islice(plain, 9))
    stream = make_stream(folder, "train", batch_examples=3, seed=1, each=double_id, workers=2)
    assert list(itertools.islice(stream, 3)) == expected[:3]
    saved = encode_state(stream)
    assert saved["batches"] == 3  # what was given, not what was read ahead
    assert list(itertools.islice(stream, 2)) == expected[3:5]
    restore_state(stream, saved)  # back, with workers running
    assert list(itertools.islice(stream, 2)) == expected[3:5]
    stream.close()
    restore_state(plain, encode_state(stream))  # a place is the same with and without workers
    assert list(itertools.islice(plain, 2)) == expected[5:7]
    plain.close()
    assert list(itertools.islice(plain, 2)) == expected[7:9]  # opens again at its place


@pytest.mark.timeout(120)
def test_a_fault_in_a_worker_is_an_error_not_a_deadlock(tmp_path):
    examples = [Example(name, (), "", "") for name in ("1", "2", "fault", "3")]
    write_dataset(tmp_path / "data", {"train": examples}, {})
    stream = make_stream(
        tmp_path / "data", "train", batch_examples=2, seed=0, each=double_id, workers=1
    )
    with pytest.raises(Exception, match="example 'fault' cannot be encoded"):
        list(itertools.islice(stream, 2))
    stream.close()
