"""The card beside the shards: what is in them, how they were made, how to read them.

    DIR/README.md     counts, statistics, schema, recipe, versions, licence, one Example
    DIR/samples/      the first pictures of the first split that has some

Next: data_pipelines/shards.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.example import Example, decode_image
from data_pipelines.leakage import Identity

CARD = "README.md"
SAMPLES = "samples"
SAMPLE_EXAMPLES = 4
SAMPLE_CHARS = 1500  # of a policy's text in the card

SCHEMA = """\
Every record of a shard is one MessagePack map:

| key | type | meaning |
| --- | --- | --- |
| `example_id` | str | unique in its split |
| `images` | list of bytes | input images, encoded (PNG, JPEG, ...) |
| `query` | str | what the user asks; never contains the policy |
| `answer` | str | the right answer |
| `cot` | str | chain of thought, without its tags; empty = none |
| `policy_name` | str | the name that the query uses; empty = no policy |
| `policy_text` | str | the policy document; `<image>` marks the place of a policy image |
| `policy_images` | list of bytes | the document's own images, in the order of their marks |
| `meta` | map | facts for graders and reports; `answer_form` says how the answer is graded |

With this project: `from data_pipelines.streaming import read_split; read_split(DIR, "SPLIT")`.
With nothing but two packages, neither of which needs TensorFlow:

```python
import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource

source = ArrayRecordDataSource(["DIR/SPLIT-00000-of-00001.array_record"])
record = msgpack.unpackb(source[0])
```
"""


def write_card(
    folder: Path,
    manifest: Mapping[str, Any],
    splits: Mapping[str, Sequence[Identity]],
    samples: Sequence[Example],
    licence: str,
) -> None:
    """Write README.md and samples/ into a dataset's folder."""
    name = manifest["recipe"].get("dataset", folder.name)
    pictures = _write_samples(folder, samples)
    lines = [f"# {name}", ""]
    lines += ["| split | examples | shards | MiB | policies | scenes or tasks | distinct answers |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for split, facts in manifest["splits"].items():
        size = sum(shard["size_bytes"] for shard in facts["shards"]) / 2**20
        about = manifest["leakage"][split]
        answers = len({row.answer for row in splits[split]})
        lines.append(
            f"| {split} | {facts['count']} | {len(facts['shards'])} | {size:.1f}"
            f" | {about['policies']} | {about['sources']} | {answers} |"
        )
    lines += ["", "Mean characters, and images an example:", ""]
    lines += ["| split | policy | query | chain of thought | images |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for split, rows in splits.items():
        if rows:
            means = [sum(row.chars[i] for row in rows) / len(rows) for i in range(3)]
            images = sum(row.images for row in rows) / len(rows)
            lines.append(f"| {split} | {' | '.join(f'{m:.0f}' for m in means)} | {images:.2f} |")
    lines += ["", "## Train and test", "", _leakage_text(manifest["leakage"]), ""]
    lines += ["## Schema", "", SCHEMA]
    lines += ["## How it was made", "", "```json"]
    lines += [json.dumps(manifest["recipe"], indent=1, sort_keys=True), "```", ""]
    lines += ["Equal recipes give equal shards with these versions: "]
    lines[-1] += ", ".join(f"{k} {v}" for k, v in manifest["built_with"].items()) + "."
    lines += ["", "## Licence", "", licence or "Not stated by whoever built it.", ""]
    lines += _sample_text(samples, pictures)
    (folder / CARD).write_text("\n".join(lines).rstrip("\n") + "\n")


def _leakage_text(report: Mapping[str, Mapping[str, int]]) -> str:
    lines = [
        "No scene or task, and no question about the same images, stands in a training split"
        " (`train...`, `cot...`) and in another; the build checked it. Policies, by name and text:",
        "",
        "| split | policies | as in training | changed under the same name |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {split} | {facts['policies']} | {facts['policies_as_in_training']}"
        f" | {facts['policies_changed']} |"
        for split, facts in report.items()
    ]
    return "\n".join(lines)


def _write_samples(folder: Path, samples: Sequence[Example]) -> list[str]:
    """Samples' first images as PNG files; returns their paths inside the folder."""
    written = []
    for number, example in enumerate(samples):
        try:
            pixels = decode_image(example.images[0])
        except (ValueError, IndexError):
            continue
        (folder / SAMPLES).mkdir(exist_ok=True)
        path = f"{SAMPLES}/{number}.png"
        buffer = io.BytesIO()
        Image.fromarray(pixels, "RGB").save(buffer, format="PNG")
        (folder / path).write_bytes(buffer.getvalue())
        written.append(path)
    return written


def _sample_text(samples: Sequence[Example], pictures: Sequence[str]) -> list[str]:
    if not samples:
        return []
    first = samples[0]
    lines = ["## One example", ""]
    lines += [" ".join(f"![sample]({path})" for path in pictures), ""] if pictures else []
    for title, text in (
        ("query", first.query),
        ("answer", first.answer),
        ("chain of thought", first.cot),
        ("policy", first.policy_text),
    ):
        if text:
            short = text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " [...]"
            lines += [f"{title}:", "", *(f"    {line}" for line in short.splitlines()), ""]
    return lines
