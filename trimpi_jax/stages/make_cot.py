r"""Chains of thought by a generator that reads the policy, kept where the answer is right.

    forward   policy, images, query               -> thought, answer    wrong answers are dropped
    reverse   policy, images, query, gold answer  -> thought, answer    and thoughts that tell of it

The generator is an actor of ours (any model folder, the policy in its prompt) or whatever stands
behind an OpenAI-compatible endpoint. The result is the given dataset with its split `cot` replaced;
what was asked, accepted and rejected stands in its manifest under `recipe.cot`.

Every reply is noted beside the output as it comes, so a killed run goes on where it was.

Source: paper section 4 (forward CoT with answer filtering for ClevrPolicy, reverse CoT for
GTAPolicy).
Next: trimpi_jax/io/chat_endpoint.py
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.building import write_dataset
from data_pipelines.dataset_card import CARD
from data_pipelines.example import Example
from data_pipelines.shards import MANIFEST, check_dataset
from data_pipelines.streaming import iter_split
from trimpi_jax.grading.answers import Grade, find_boxes
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.io.chat_endpoint import Endpoint, Reply, ask, make_conversation, open_client
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.hf_weights import check_weights, read_config
from trimpi_jax.models.processor import decode_completion, load_processor
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import ask as ask_engine
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.model_files import load_weights, model_folder

# (examples, which attempt from 0) -> (place, reply) as they come
Generate = Callable[[Sequence[Example], int], Iterator[tuple[int, Reply]]]

MODES = ("forward", "reverse")
HINT = (
    "The right answer is \\boxed{{{answer}}}. Reason towards it from the policy as if you did not"
    " know it, and never say that it was given."
)
_TELLS = re.compile(  # a thought that leans on the hint instead of the policy
    r"\b(?:answer|response|result) (?:is|was|has been) (?:already )?(?:given|known|provided|stated)"
    r"|\b(?:given|provided|known|stated|expected|gold|hinted) (?:right |correct |final )?answer\b"
    r"|\bthe (?:right|correct) answer is (?:supposed|said)\b|\bthe hint\b"
    r"|\b(?:I|we) (?:was|were|am|are) told\b",
    re.IGNORECASE,
)
ACCEPTED = "accepted"
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
ONLY_FOR = {"actor": ("rows", "dtype"), "endpoint": ("concurrency", "timeout_s")}


@dataclasses.dataclass(frozen=True)
class CotSettings:
    """Let a generator think aloud about a dataset's training examples; keep what ends right.

    Attributes:
        data: the dataset, as data_pipelines.build wrote it.
        out: the folder to write: the same dataset with these chains of thought; must be new.
        model: the generator: a model folder, or with base_url the name that the endpoint knows.
        base_url: an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; the key is read
            from OPENAI_API_KEY; "" = an actor of ours.
        mode: forward: policy and query. reverse: the generator sees the right answer, too.
        examples: how many training examples are asked, spread over the policies; 0 = as many as
            the dataset's split cot has.
        attempts: tries of an example before it is dropped.
        temperature: of sampling; 0 = greedy, for one attempt only.
        max_new_tokens: longest reply.
        min_accuracy: lowest accuracy that is kept; below 1 for graded scores only.
        instruction: a sentence put after the query, e.g. how to reason.
        seed: of sampling.
        rows: actor: prompts a batch.
        dtype: actor: of its activations, float32 or bfloat16.
        concurrency: endpoint: requests under way at a time.
        timeout_s: endpoint: seconds that a request may take.
    """

    data: str
    out: str
    model: str
    base_url: str = ""
    mode: str = "forward"
    examples: int = 0
    attempts: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 1024
    min_accuracy: float = 1.0
    instruction: str = ""
    seed: int = 0
    rows: int = 16
    dtype: str = "float32"
    concurrency: int = 8
    timeout_s: float = 300.0

    def __post_init__(self):
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode must be one of {MODES}, got '{self.mode}'")
        if min(self.attempts, self.max_new_tokens, self.rows, self.concurrency) < 1:
            problems.append("attempts, max_new_tokens, rows and concurrency must be >= 1")
        if self.examples < 0 or self.temperature < 0 or self.timeout_s <= 0:
            problems.append("examples and temperature must be >= 0, timeout_s above 0")
        if not 0 < self.min_accuracy <= 1:
            problems.append(f"min_accuracy must be in (0, 1], got {self.min_accuracy}")
        if self.temperature == 0 and self.attempts > 1:
            problems.append("temperature 0 says the same every time: attempts must be 1")
        idle = ONLY_FOR["actor" if self.base_url else "endpoint"]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in idle if getattr(self, name) != defaults[name]]
        if changed:
            kind = "an endpoint" if self.base_url else "an actor"
            problems.append(f"{changed} have no effect with {kind} as the generator")
        if problems:
            raise ValueError("; ".join(problems))


def run(settings: CotSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Ask, keep, write; returns the statistics.

    Raises:
        ValueError, OSError, ImportError: bad data, model, endpoint or folder; nothing accepted.
    """
    progress = progress or Progress()
    manifest = check_dataset(settings.data)
    out = Path(settings.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; delete it or choose another folder")
    chosen = choose_examples(settings, manifest)
    journal = Journal(out.parent / f".{out.name}.cot.jsonl", _identity(settings))
    generate = make_endpoint(settings) if settings.base_url else make_actor(settings, chosen)
    collect(settings, chosen, generate, journal, progress)
    ids = {example.example_id for example in chosen}
    made = [e for e in journal.entries if e["id"] in ids and e["attempt"] < settings.attempts]
    facts = summarize(settings, chosen, made)
    if not facts["accepted"]:
        raise ValueError(
            f"none of {len(chosen)} examples got a chain of thought that ends right"
            f" ({facts['rejected']}); nothing was written. The replies are in {journal.path}"
        )
    splits = {name: iter_split(settings.data, name) for name in manifest["splits"]}
    splits["cot"] = _with_thoughts(settings, chosen, journal.accepted)
    recipe = manifest["recipe"] | {"cot": facts}
    write_dataset(out, splits, recipe, licence=_licence(settings.data))
    journal.path.unlink()
    progress.say(
        f"{facts['accepted']}/{facts['asked']} examples accepted"
        f" ({100 * facts['acceptance_rate']:.1f} %), {facts['attempts_made']} replies"
        f" ({100 * facts['acceptance_rate_of_replies']:.1f} % of them kept);"
        f" rejected: {facts['rejected'] or 'none'}"
    )
    progress.say(f"{out}: split cot has {facts['accepted']} examples; the others are as they were")
    return facts


def choose_examples(settings: CotSettings, manifest: Mapping[str, Any]) -> list[Example]:
    """The first training examples of every policy, as many of each as of the others (or one more).

    Raises:
        ValueError: the dataset has no such examples, or does not say how many.
    """
    splits = manifest["splits"]
    wanted = settings.examples or splits.get("cot", {"count": 0})["count"]
    if not wanted:
        raise ValueError(f"{settings.data} has no chains of thought; say how many with --examples")
    if not splits.get("train", {"count": 0})["count"]:
        raise ValueError(f"{settings.data} has no split 'train' to think about")
    of_policy: dict[str, list[int]] = {}
    for i, example in enumerate(iter_split(settings.data, "train")):
        of_policy.setdefault(example.policy_name, []).append(i)
    places = [
        queue[turn] for turn in range(wanted) for queue in of_policy.values() if turn < len(queue)
    ][:wanted]
    if len(places) < wanted:
        raise ValueError(f"{settings.data} has {len(places)} training examples, not {wanted}")
    chosen = list(iter_split(settings.data, "train", sorted(places)))
    without = [example.example_id for example in chosen if not example.policy_text]
    if without:
        raise ValueError(f"{len(without)} examples have no policy to reason from, as {without[0]}")
    return chosen


def collect(
    settings: CotSettings,
    chosen: Sequence[Example],
    generate: Generate,
    journal: Journal,
    progress: Progress,
) -> None:
    """Ask round after round those that have no chain of thought yet.

    Raises:
        ValueError: a whole round brought no text at all.
    """
    total = len(chosen) * settings.attempts
    with progress.task("thinking", total) as bar:
        for attempt in range(settings.attempts):
            open_ones = [e for e in chosen if e.example_id not in journal.accepted]
            waiting = [e for e in open_ones if not journal.has(e.example_id, attempt)]
            spent = attempt * len(chosen) + len(chosen) - len(waiting)
            problems: list[str] = []
            asked = [_as_asked(settings, example) for example in waiting]
            for number, (place, reply) in enumerate(generate(asked, attempt)):
                cot, reason = judge(settings, waiting[place], reply)
                kept = {"cot": cot} if reason == ACCEPTED else {"text": reply.text}
                journal.note(waiting[place].example_id, attempt, reason, **kept)
                problems += [reply.problem] if reply.problem else []
                bar(spent + number + 1, {})
            if waiting and len(problems) == len(waiting):
                raise ValueError(
                    f"none of {len(waiting)} requests brought a text:"
                    f" {dict(collections.Counter(problems))}"
                )
        bar(total, {})


def judge(settings: CotSettings, example: Example, reply: Reply) -> tuple[str, str]:
    """(chain of thought, "accepted"), or ("", why not)."""
    if reply.problem:
        return "", reply.problem
    grade = grade_completions([reply.text], [example], [reply.stopped])[0]
    thought, reason = find_thought(reply.text, reply.stopped, grade, settings.min_accuracy)
    if thought and settings.mode == "reverse" and _TELLS.search(thought):
        return "", "tells_the_hint"
    return thought, reason


def find_thought(text: str, stopped: bool, grade: Grade, min_accuracy: float) -> tuple[str, str]:
    """(chain of thought, "accepted") of a right completion, or ("", why it is not kept).

    Unlike the format reward, words between thought and box do not matter: only the thought is kept.
    """
    if not stopped:
        return "", "cut_off"
    if grade.accuracy < min_accuracy:
        return "", "wrong_answer" if grade.parsed is not None else "no_box"
    thoughts = _THOUGHT.findall(text)
    if len(thoughts) != 1 or text.count("<think>") != 1 or not thoughts[0].strip():
        return "", "no_think" if len(thoughts) < 2 else "repeated_think"
    thought = thoughts[0].strip()
    return ("", "box_in_thought") if find_boxes(thought) else (thought, ACCEPTED)


def summarize(
    settings: CotSettings, chosen: Sequence[Example], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Counts and acceptance rates, JSON-able; `by_policy` is [accepted, asked]."""
    accepted = {entry["id"] for entry in entries if entry["reason"] == ACCEPTED}
    rejected = count_rejected(entries)
    by_policy: dict[str, list[int]] = {}
    for example in chosen:
        counts = by_policy.setdefault(example.policy_name, [0, 0])
        counts[0] += example.example_id in accepted
        counts[1] += 1
    options = dataclasses.asdict(settings)
    told = ("mode", "attempts", "temperature", "max_new_tokens", "min_accuracy", "instruction")
    return {
        "generator": "endpoint" if settings.base_url else "actor",
        "model": settings.model if settings.base_url else Path(settings.model).name,
        **{name: options[name] for name in (*told, "seed")},
        "asked": len(chosen),
        "accepted": len(accepted),
        "acceptance_rate": len(accepted) / len(chosen),
        "attempts_made": len(entries),
        "acceptance_rate_of_replies": len(accepted) / max(len(entries), 1),
        "rejected": rejected,
        "by_policy": by_policy,
    }


def count_rejected(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Why replies were not kept: reason -> count."""
    reasons = collections.Counter(entry["reason"] for entry in entries)
    del reasons[ACCEPTED]
    return dict(sorted(reasons.items()))


def make_endpoint(settings: CotSettings) -> Generate:
    """A generator behind an OpenAI-compatible endpoint."""
    endpoint = Endpoint(
        settings.base_url,
        settings.model,
        settings.temperature,
        settings.max_new_tokens,
        settings.concurrency,
        settings.timeout_s,
    )
    client = open_client(endpoint)

    def generate(examples: Sequence[Example], attempt: int) -> Iterator[tuple[int, Reply]]:
        conversations = [make_conversation(example) for example in examples]
        yield from ask(client, endpoint, conversations, settings.seed * 1000 + attempt)

    return generate


def make_actor(settings: CotSettings, chosen: Sequence[Example]) -> Generate:
    """A generator that is a model folder of ours; `chosen` decides the sizes of its batches.

    Raises:
        ValueError, OSError: no such folder, or one that cannot be read.
    """
    folder = model_folder(settings.model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; is --base-url missing?")
    config = read_config(folder)
    check_weights(folder, config)
    processor = load_processor(folder, config)
    mesh = make_mesh()
    if settings.rows % mesh.shape["data"]:
        raise ValueError(f"rows {settings.rows} is not divisible by {mesh.shape['data']} devices")
    params = load_weights(folder, config, mesh)
    sampler = SamplerSettings(
        completions=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        dtype=settings.dtype,
    )
    longest, windows = 1, 1
    for example in chosen:
        row = encode_prompt(_as_asked(settings, example), processor, policy_in_prompt=True)
        longest, windows = max(longest, len(row.tokens)), max(windows, len(row.images.patches))

    engine = make_engine(
        config, processor, PromptSizes((longest,), (windows,)), mesh, dtype=settings.dtype
    )
    with jax.set_mesh(mesh):
        weights = engine.load(params)

    def generate(examples: Sequence[Example], attempt: int) -> Iterator[tuple[int, Reply]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), attempt)
        for start in range(0, len(examples), settings.rows):
            part = examples[start : start + settings.rows]
            with jax.set_mesh(mesh):
                questions, rollouts = ask_engine(
                    engine, weights, part, sampler, key, aware=True, num_rows=settings.rows
                )
            assert len(questions.examples) == len(part)  # the sizes were chosen from all of them
            for i in range(len(part)):
                tokens = rollouts.tokens[i, 0, : rollouts.lengths[i, 0]]
                text = decode_completion(processor, tokens)
                yield start + i, Reply(text, bool(rollouts.stopped[i, 0]))

    return generate


class Journal:
    """Every reply with its verdict, one JSON line each, written as it comes.

    Raises:
        ValueError: the file belongs to another dataset or other settings.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self.accepted: dict[str, dict[str, Any]] = {}
        self._asked: set[tuple[str, int]] = set()
        if path.is_file():
            self._read(identity)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n")

    def has(self, example_id: str, attempt: int) -> bool:
        """Whether this attempt was made."""
        return (example_id, attempt) in self._asked

    def note(self, example_id: str, attempt: int, reason: str, **kept: Any) -> None:
        """Add a verdict, and what is kept of the reply.

        A `text`, for a look at what went wrong with a rejected reply, stays in the file only.
        """
        entry = {"id": example_id, "attempt": attempt, "reason": reason} | kept
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._keep(entry)

    def _keep(self, entry: dict[str, Any]) -> None:
        entry = {name: value for name, value in entry.items() if name != "text"}
        self.entries.append(entry)
        self._asked.add((entry["id"], entry["attempt"]))
        if entry["reason"] == ACCEPTED:
            self.accepted[entry["id"]] = entry

    def _read(self, identity: Mapping[str, Any]) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        if not lines or _parse(lines[0]) != json.loads(json.dumps(identity)):
            raise ValueError(
                f"{self.path} holds replies to other questions (another dataset, generator or"
                " other settings); delete it, or write to another folder"
            )
        whole = [line for line in lines[1:] if line.endswith("\n") and _parse(line)]
        for line in whole:
            self._keep(_parse(line))
        self.path.write_text("".join([lines[0], *whole]))  # without a line cut by a kill


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _identity(settings: CotSettings) -> dict[str, Any]:
    """What the replies depend on; the number of examples and of attempts may grow."""
    options = dataclasses.asdict(settings)
    options["generator"] = "endpoint" if settings.base_url else "actor"
    where_and_how_fast = ("data", "out", "base_url", "rows", "concurrency", "timeout_s")
    for name in (*where_and_how_fast, "examples", "attempts"):
        del options[name]
    manifest = (Path(settings.data) / MANIFEST).read_bytes()
    return options | {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}


def _as_asked(settings: CotSettings, example: Example) -> Example:
    """The Example with what the generator is told beside its query."""
    hint = HINT.format(answer=example.answer) if settings.mode == "reverse" else ""
    added = [text for text in (settings.instruction, hint) if text]
    return dataclasses.replace(example, query="\n".join([example.query, *added]))


def _with_thoughts(
    settings: CotSettings, chosen: Sequence[Example], accepted: Mapping[str, Mapping[str, Any]]
) -> Iterator[Example]:
    generator = "endpoint" if settings.base_url else "actor"
    for example in chosen:
        if example.example_id in accepted:
            entry = accepted[example.example_id]
            source = {"mode": settings.mode, "generator": generator, "attempt": entry["attempt"]}
            meta = example.meta | {"cot_source": source}
            yield dataclasses.replace(example, cot=entry["cot"], meta=meta)


def _licence(folder: str) -> str:
    """What the card of a dataset says about its licence."""
    card = (Path(folder) / CARD).read_text() if (Path(folder) / CARD).is_file() else ""
    return card.partition("## Licence\n\n")[2].partition("\n\n")[0]
