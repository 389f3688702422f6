"""Grain: shards -> shuffled, host-sharded, checkpointable stream of lists of Examples.

The order is a function of (seed, epoch) only. Every host reads its own slice of the shuffled
order, all hosts the same number of batches. The iterator's state is a small dict that is saved
beside the model, so a resumed run reads the very next batch.

Source: Grain (google/grain) MapDataset; paper section 4 (epochs over the training sets).
Next: trimpi_jax/inputs/encode.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain

from data_pipelines.example import Example, decode_record
from data_pipelines.shards import split_count, split_files


class _Decode(grain.transforms.Map):
    def map(self, element: bytes) -> Example:
        return decode_record(element)


def make_stream(
    folder: str | Path,
    split: str,
    *,
    batch_examples: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of lists of `batch_examples` Examples (this host's share).

    Every epoch is a fresh shuffle of the whole split. `get_state()` and `set_state()` of the
    iterator save and restore the place.

    Raises:
        ValueError: a missing split, or fewer Examples than one batch of all hosts.
    """
    files = split_files(folder, split)
    count = split_count(folder, split)
    if count < batch_examples * process_count:
        raise ValueError(
            f"{folder} split '{split}' has {count} examples, fewer than one batch of"
            f" {batch_examples} on {process_count} hosts; lower the batch size or build more"
        )
    source = grain.sources.ArrayRecordDataSource(files)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset[process_index::process_count].map(_Decode())
    dataset = dataset.batch(batch_examples, batch_fn=list)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def read_split(folder: str | Path, split: str, limit: int | None = None) -> Sequence[Example]:
    """The first `limit` Examples of a split in file order (all of them when None)."""
    files = split_files(folder, split)
    if not files:
        return []
    source = grain.sources.ArrayRecordDataSource(files)
    count = len(source) if limit is None else min(limit, len(source))
    return [decode_record(source[i]) for i in range(count)]


def iter_split(folder: str | Path, split: str) -> Iterator[Example]:
    """The Examples of a split in file order, one in memory at a time."""
    if files := split_files(folder, split):
        source = grain.sources.ArrayRecordDataSource(files)
        for i in range(len(source)):
            yield decode_record(source[i])


def encode_state(iterator: grain.DatasetIterator) -> dict:
    """The iterator's state as a JSON-able dict."""
    state = iterator.get_state()
    return {"grain": state.decode() if isinstance(state, bytes) else json.dumps(state)}


def restore_state(iterator: grain.DatasetIterator, saved: dict) -> None:
    """Put the iterator where `encode_state` was called."""
    current = iterator.get_state()
    text = saved["grain"]
    iterator.set_state(text.encode() if isinstance(current, bytes) else json.loads(text))
