"""Grain: shards -> mixed, shuffled, host-sharded, checkpointable stream of lists of Examples.

    shards of a source -> shuffle anew each epoch -> every n-th to host n -> mix by weight -> decode
    -> map -> batch

The order is a function of (seed, sources) only. Each host reads its own slice of every source's
shuffled order, so all hosts have the same mixture and the same number of batches. The place in the
stream is a number of batches: a resumed run reads the very next one, with as many worker processes
as it likes.

Source: Grain (google/grain) MapDataset; paper section 4 (epochs over the training sets).
Next: trimpi_jax/inputs/encode.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from data_pipelines.example import Example, decode_record
from data_pipelines.shards import read_manifest, split_count, split_files

SEED_STEP = 7919  # ours, a prime: sources of one stream are shuffled apart
WORKER_BUFFER = 2  # batches a worker keeps ready


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """A split of a dataset, and its share of a mixture (of examples, whatever its size)."""

    folder: str | Path
    split: str
    weight: float = 1.0


class _Decode(grain.transforms.Map):
    def map(self, element: bytes) -> Example:
        return decode_record(element)


@dataclasses.dataclass(frozen=True)
class _Call(grain.transforms.Map):
    function: Callable[[Example], Any]

    def map(self, element: Example) -> Any:
        return self.function(element)


class ExampleStream(Iterator[list[Any]]):
    """An endless iterator of batches that knows its place; see `make_stream`."""

    def __init__(self, batches: grain.MapDataset, workers: int, identity: dict[str, Any]):
        self._batches, self._workers, self._identity = batches, workers, identity
        self._taken = 0
        self._iterator: Iterator[list[Any]] | None = None

    def __next__(self) -> list[Any]:
        if self._iterator is None:
            self._iterator = _open(self._batches[self._taken :], self._workers)
        batch = next(self._iterator)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place, JSON-able."""
        return {"batches": self._taken, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place.

        Raises:
            ValueError: it is a place in another stream.
        """
        here = self._identity
        if set(state) != {"batches", *here} or state["data"] != here["data"]:
            raise ValueError(
                "the saved place belongs to a stream of other data, seed or weights; start anew, or"
                f" use what it was saved with (saved {state}, this stream {here})"
            )
        # with one source a place is a number of examples, whoever reads them
        examples = state["batches"] * state["batch_examples"] * state["hosts"]
        step = here["batch_examples"] * here["hosts"]
        same = all(state[key] == here[key] for key in here)
        if not same and (here["sources"] > 1 or examples % step):
            raise ValueError(
                f"the saved place ({state['batches']} batches of {state['batch_examples']} on"
                f" {state['hosts']} hosts) is no whole number of batches of"
                f" {here['batch_examples']} on {here['hosts']} hosts, or several sources are mixed;"
                " use the saved batch size and number of hosts"
            )
        self.close()
        self._taken = examples // step

    def close(self) -> None:
        """Stop workers; the stream opens again at its place when it is asked for more."""
        if self._iterator is not None:
            getattr(self._iterator, "close", lambda: None)()
            self._iterator = None


def make_stream(
    folder: str | Path,
    split: str,
    *,
    batch_examples: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    each: Callable[[Example], Any] | None = None,
) -> ExampleStream:
    """`make_mixed_stream` of one source."""
    return make_mixed_stream(
        [StreamSource(folder, split)],
        batch_examples=batch_examples,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
        each=each,
    )


def make_mixed_stream(
    sources: Sequence[StreamSource],
    *,
    batch_examples: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    each: Callable[[Example], Any] | None = None,
) -> ExampleStream:
    """An endless iterator of lists of `batch_examples` Examples (this host's share).

    Every epoch of a source is a fresh shuffle of its whole split. Of any N batches each source
    gives its share of the weights, give or take one example.

    Args:
        sources: what is mixed.
        batch_examples: Examples in a batch of this host.
        seed: of the shuffles.
        process_index, process_count: this host among all.
        workers: processes that read, decode and map ahead; 0 = a thread of this process.
        each: done to every Example (encoding, say); picklable when there are workers.

    Raises:
        ValueError: a missing split, a weight that is not above 0, or fewer Examples in a source
            than one batch of all hosts.
    """
    if not sources or any(not 0 < source.weight < float("inf") for source in sources):
        raise ValueError(f"expected sources with weights above 0, got {list(sources)}")
    parts, total = [], sum(source.weight for source in sources)
    for number, source in enumerate(sources):
        count = split_count(source.folder, source.split)
        if (count < batch_examples * process_count and len(sources) == 1) or not count:
            raise ValueError(
                f"{source.folder} split '{source.split}' has {count} examples, fewer than one batch"
                f" of {batch_examples} on {process_count} hosts; lower the batch size or build more"
            )
        records = grain.sources.ArrayRecordDataSource(split_files(source.folder, source.split))
        part = grain.MapDataset.source(records).seed(seed + SEED_STEP * number).shuffle().repeat()
        parts.append(part[process_index::process_count])
    dataset = parts[0]
    if len(parts) > 1:
        dataset = grain.MapDataset.mix(parts, [source.weight / total for source in sources])
    dataset = dataset.map(_Decode())
    if each is not None:
        dataset = dataset.map(_Call(each))
    identity = {
        "data": _fingerprint(sources, seed),
        "sources": len(sources),
        "batch_examples": batch_examples,
        "hosts": process_count,
    }
    return ExampleStream(dataset.batch(batch_examples, batch_fn=list), workers, identity)


def read_split(folder: str | Path, split: str, limit: int | None = None) -> Sequence[Example]:
    """The first `limit` Examples of a split in file order (all of them when None)."""
    files = split_files(folder, split)
    if not files:
        return []
    source = grain.sources.ArrayRecordDataSource(files)
    count = len(source) if limit is None else min(limit, len(source))
    return [decode_record(source[i]) for i in range(count)]


def iter_split(
    folder: str | Path, split: str, places: Iterable[int] | None = None
) -> Iterator[Example]:
    """The Examples of a split, or those at some places, one in memory at a time."""
    if files := split_files(folder, split):
        source = grain.sources.ArrayRecordDataSource(files)
        for i in range(len(source)) if places is None else places:
            yield decode_record(source[i])


def encode_state(stream: ExampleStream) -> dict[str, Any]:
    """The stream's place as a JSON-able dict."""
    return stream.get_state()


def restore_state(stream: ExampleStream, saved: dict[str, Any]) -> None:
    """Put the stream where `encode_state` was called."""
    stream.set_state(saved)


def _open(batches: grain.MapDataset, workers: int) -> Iterator[list[Any]]:
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = batches.to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, whoever starts it
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=WORKER_BUFFER
        )
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(dataset)


def _start_worker(number: int, count: int) -> None:
    """In a worker, before it imports JAX: it must not open the accelerator."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def _fingerprint(sources: Sequence[StreamSource], seed: int) -> str:
    """Digest of everything that decides the order."""
    facts: list[Any] = [seed]
    for source in sources:
        shards = read_manifest(source.folder)["splits"][source.split]["shards"]
        facts.append([source.split, source.weight, [shard["sha256"] for shard in shards]])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
