"""Read a user's folder: policy, task, examples and every picture; list all that is wrong with it.

    DIR/policy.md         the document; pictures by relative link: ![what it shows](pictures/a.png)
    DIR/examples.jsonl    a few hundred questions with their answers
    DIR/task.toml         the policy's name, the answer's form, wording, split
    DIR/override/         optional: policy.md, changed under the same name, and examples.jsonl with
                          what is right under it (paper section 5, policy override)

Nothing is written here and nothing is run but the grading function that task.toml names, if the
answer's form is `python`. A link may not leave the folder, whether by `..`, by an absolute path or
by a symbolic link.

Next: data_pipelines/own_policy/dataset.py
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from markdown_it import MarkdownIt
from PIL import Image

from data_pipelines.answer_forms import Pattern, Python, ToolCall, gold_problem, pattern_problem
from data_pipelines.example import IMAGE_MARK, decode_image, encode_png
from data_pipelines.own_policy.task import (
    Line,
    Problem,
    Task,
    check_text,
    read_line,
    read_task,
)
from data_pipelines.own_policy.user_function import call_user_function, file_sha256

POLICY, EXAMPLES, TASK = "policy.md", "examples.jsonl", "task.toml"
OVERRIDE = "override"
MAX_IMAGE_BYTES = 100_000_000
MAX_TEXT_BYTES = 1_000_000_000
MAX_ASPECT = 200  # longer strips are refused by the model's image processor
MARKDOWN_IMAGE = re.compile(  # its link is group 1 or 2
    r"!\[(?:[^\[\]\\]|\\.)*\]\(\s*(?:<([^<>\n]*)>|([^\s()]*))(?:\s+\"[^\"\n]*\")?\s*\)"
)


class Entry(NamedTuple):
    """One good line of examples.jsonl."""

    example_id: str
    line_number: int
    line: Line
    answer: str  # canonical text
    images: tuple[bytes, ...]
    form: dict[str, Any]  # for meta["answer_form"]


class Policy(NamedTuple):
    """A document: its text with a mark for each picture, and the pictures in that order."""

    text: str
    images: tuple[bytes, ...]


class Folder(NamedTuple):
    """A folder without a problem."""

    task: Task
    policy: Policy
    entries: list[Entry]
    override: tuple[Policy, list[Entry]] | None
    sha256: str  # of everything that was read


class Picture(NamedTuple):
    """A picture's bytes as they go into the shards, and a digest of its file."""

    content: bytes
    sha256: str


def read_folder(source: str | Path) -> Folder:
    """The folder's content.

    Raises:
        ValueError: listing every problem of every file, a line each.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise ValueError(f"{source} is no folder; it should hold {POLICY}, {EXAMPLES} and {TASK}")
    problems: list[Problem] = []
    changed = [f"{OVERRIDE}/{name}" for name in (POLICY, EXAMPLES)]
    names = [POLICY, EXAMPLES, TASK, *(changed if (root / OVERRIDE).exists() else [])]
    texts = {name: _read_text(root, name, problems) for name in names}
    task = None
    if (task_text := texts[TASK]) is not None:
        task, found = read_task(task_text, TASK)
        problems += found
    pictures = _Pictures(root, task)
    policy = _read_policy(texts[POLICY] or "", POLICY, pictures, problems)
    if task is not None:
        problems += [Problem(TASK, 0, text) for text in _task_problems(task, root, policy.text)]
    entries = _read_examples(texts[EXAMPLES] or "", EXAMPLES, task, pictures, problems)
    override = None
    if len(names) > 3:
        override = (
            _read_policy(texts[changed[0]] or "", changed[0], pictures, problems),
            _read_examples(texts[changed[1]] or "", changed[1], task, pictures, problems),
        )
    if task is not None and not problems:
        problems += _split_problems(task, entries)
        problems += _function_problems(task, root, entries, EXAMPLES)
        if override:
            problems += _override_problems(task, policy, entries, *override)
            problems += _function_problems(task, root, override[1], changed[1])
    if problems:
        raise ValueError(_listing(source, problems))
    assert task is not None
    digest = hashlib.sha256()
    for name in names:
        digest.update((texts[name] or "").encode())
    if isinstance(task.answer, Python):
        digest.update((root / task.answer.file).read_bytes())
    for name, picture in sorted(pictures.found.items()):
        digest.update(f"{name}\0{picture.sha256}".encode())
    return Folder(task, policy, entries, override, digest.hexdigest())


def _listing(source: str | Path, problems: list[Problem]) -> str:
    order = {POLICY: 0, TASK: 1, EXAMPLES: 2}  # then those of override/
    problems = sorted(set(problems), key=lambda item: (order.get(item.file, 3), *item))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {source}; nothing was written:\n  " + "\n  ".join(map(str, problems))


def _read_text(root: Path, name: str, problems: list[Problem]) -> str | None:
    try:
        content = _inside(root, name).read_bytes()
    except ValueError as error:
        problems.append(Problem(name, 0, str(error)))
        return None
    if len(content) > MAX_TEXT_BYTES:
        problems.append(Problem(name, 0, f"{len(content)} bytes are more than {MAX_TEXT_BYTES}"))
        return None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.append(Problem(name, line, f"no UTF-8 text (byte 0x{content[error.start]:02x})"))
        return None


def _inside(root: Path, link: str) -> Path:
    """The existing file that a relative link names.

    Raises:
        ValueError: it leaves the folder, or is not there.
    """
    path = root / link
    if "\0" in link or "\\" in link:
        raise ValueError(f"{link!r} is no path; write forward slashes")
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of symbolic links
        raise ValueError(f"'{link}' cannot be followed: {error}") from error
    if Path(link).is_absolute() or not real.is_relative_to(root.resolve()):
        raise ValueError(
            f"'{link}' leaves the folder; copy the file into it and link it relatively"
        )
    try:
        if real.exists() and not real.is_file():
            raise ValueError(f"'{link}' is no file")
        if not real.exists():
            near = [item.name for item in real.parent.iterdir()] if real.parent.is_dir() else []
            close = difflib.get_close_matches(real.name, near, n=1)
            raise ValueError(
                f"'{link}' is not there" + (f"; did you mean '{close[0]}'?" if close else "")
            )
    except OSError as error:
        raise ValueError(f"'{link}' cannot be read: {error}") from error
    return real


class _Pictures:
    """Reads each picture once; remembers what was wrong with a bad one.

    A link is relative to the file that it stands in, and may not leave the folder.
    """

    def __init__(self, root: Path, task: Task | None):
        self.root = root
        self.max_pixels = task.images.max_pixels if task else None
        self.found: dict[str, Picture] = {}
        self.bad: dict[str, str] = {}

    def read(self, link: str, file: str) -> Picture | str:
        """The picture that a link in a file names, or what is wrong with it."""
        if file.startswith(f"{OVERRIDE}/") and not link.startswith("/"):
            link = f"{OVERRIDE}/{link}"
        if link not in self.found and link not in self.bad:
            try:
                self.found[link] = self._read(link)
            except (ValueError, OSError) as error:
                self.bad[link] = str(error)
        return self.found.get(link) or self.bad[link]

    def _read(self, link: str) -> Picture:
        path = _inside(self.root, link)
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ValueError(
                f"'{link}' has {path.stat().st_size} bytes, more than {MAX_IMAGE_BYTES}"
            )
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused just after
            pixels = decode_image(content, f"'{link}'")
        height, width = pixels.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"'{link}': {width}x{height} pixels, a strip over {MAX_ASPECT} to 1")
        digest = hashlib.sha256(content).hexdigest()
        if self.max_pixels and height * width > self.max_pixels:
            scale = (self.max_pixels / (height * width)) ** 0.5
            size = (max(1, int(width * scale)), max(1, int(height * scale)))
            smaller = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
            content = _encode_like(content, smaller)
        return Picture(content, digest)


def _encode_like(original: bytes, image: Image.Image) -> bytes:
    """A scaled picture: JPEG stays JPEG (a photo), everything else becomes PNG."""
    with Image.open(io.BytesIO(original)) as source:
        jpeg = source.format == "JPEG"
    if not jpeg:
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def _read_policy(text: str, file: str, pictures: _Pictures, problems: list[Problem]) -> Policy:
    """The document of a file."""
    lines = text.split("\n")
    if not text.strip():
        problems.append(Problem(file, 0, "the policy is empty"))
    for number, line in enumerate(lines, start=1):
        problems += [Problem(file, number, message) for message in check_text(line, "the policy")]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    links = [str(child.attrs["src"]) for child in inline if child.type == "image"]
    code = {
        row
        for token in tokens
        if token.type in ("fence", "code_block") and token.map
        for row in range(*token.map)
    }
    places = [
        (row, match[1] or match[2])
        for row, line in enumerate(lines)
        if row not in code
        for match in MARKDOWN_IMAGE.finditer(line)
    ]
    # what is cut out of the text must be what the parser calls a picture, in the same order
    for (row, found), link in _pairs(places, links):
        if unquote(found) != unquote(str(link)):
            message = (
                "write a picture as ![what it shows](folder/file.png), on one line, not in code"
            )
            problems.append(Problem(file, row + 1 if found else 0, message))
            return Policy("", ())
    problems += [
        Problem(file, token.map[0] + 1, "write <img> as ![what it shows](folder/file.png)")
        for token in tokens
        if token.map and "<img" in token.content.lower() and token.type in ("inline", "html_block")
    ]
    images: list[bytes] = []
    for row, link in places:
        picture = _linked_picture(link, file, pictures)
        if isinstance(picture, str):
            problems.append(Problem(file, row + 1, picture))
        else:
            images.append(picture.content)
        lines[row] = MARKDOWN_IMAGE.sub(IMAGE_MARK, lines[row])
    return Policy("\n".join(lines).strip(), tuple(images))


def _pairs(places: list[tuple[int, str]], links: list[str]) -> list[tuple[tuple[int, str], str]]:
    """Both lists side by side; what one of them lacks is empty."""
    longest = max(len(places), len(links))
    places = places + [(0, "")] * (longest - len(places))
    return list(zip(places, links + [""] * (longest - len(links)), strict=True))


def _linked_picture(link: str, file: str, pictures: _Pictures) -> Picture | str:
    address = urlsplit(link)
    if address.scheme or address.netloc:
        return f"'{link}' is no file of the folder; download it and link it relatively"
    return pictures.read(unquote(address.path), file)


def _task_problems(task: Task, root: Path, policy: str) -> list[str]:
    problems = check_text(task.prompt.template + task.prompt.instruction, "[prompt]")
    form = task.answer
    if isinstance(form, Python):
        try:
            _inside(root, form.file)
        except ValueError as error:
            problems.append(f"answer.file: {error}")
        if form.sha256:
            problems.append("answer.sha256 is written by the build; delete it")
    if isinstance(form, ToolCall):
        for tool in form.tools:
            if not re.search(rf"(?<!\w){re.escape(tool)}(?!\w)", policy):
                problems.append(f"answer.tools has '{tool}', which {POLICY} never names")
    return problems


def _read_examples(
    text: str,
    file: str,
    task: Task | None,
    pictures: _Pictures,
    problems: list[Problem],
) -> list[Entry]:
    entries: list[Entry] = []
    first_line: dict[str, int] = {}
    rows = [(number, row) for number, row in enumerate(text.split("\n"), start=1) if row.strip()]
    if not rows:
        problems.append(Problem(file, 0, "there is no example"))
    for number, row in rows:
        line, found = read_line(row, file, number)
        here: list[str] = []
        if line is not None:
            name = line.id or f"line-{number:06d}"
            if name in first_line:
                here.append(f"the id '{name}' stands on line {first_line[name]} already")
            first_line.setdefault(name, number)
            images = [pictures.read(link, file) for link in line.images]
            here += [image for image in images if isinstance(image, str)]
            if line.split and file != EXAMPLES:
                here.append("split has no effect here: all of these examples are held out")
            answer, form, wrong = _read_answer(line, task)
            here += wrong + _text_problems(line, answer, task)
            if not here:
                contents = tuple(image.content for image in images if isinstance(image, Picture))
                entries.append(Entry(name, number, line, answer, contents, form))
        problems += found + [Problem(file, number, message) for message in here]
    return entries


def _read_answer(line: Line, task: Task | None) -> tuple[str, dict[str, Any], list[str]]:
    """(canonical text, answer form, problems) of a line."""
    answer, problems = line.answer, []
    form: Any = task.answer if task else None
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    text = text.strip()
    if not text:
        return "", {}, ["the answer is absent"]
    if isinstance(answer, dict) and task and not isinstance(form, ToolCall):
        problems.append(f"the answer is an object, but the answer form is '{form.form}'")
    if line.pattern is not None and task:
        if not isinstance(form, Pattern):
            problems.append(f"pattern has no effect with the answer form '{form.form}'")
        elif wrong := pattern_problem(line.pattern):
            return text, {}, [*problems, wrong]
        else:
            form = Pattern(pattern=line.pattern)
    if task and not problems and (wrong := gold_problem(text, form)):
        problems.append(wrong)
    return text, form.model_dump() if form else {}, problems


def _text_problems(line: Line, answer: str, task: Task | None) -> list[str]:
    texts = {
        "the query": line.query,
        "the answer": answer,
        "the chain of thought": line.cot,
        "the profile": " ".join(f"{key} {value}" for key, value in line.profile.items()),
        "the history": " ".join(f"{turn.role} {turn.text}" for turn in line.history),
    }
    problems = [message for what, text in texts.items() for message in check_text(text, what)]
    if "think>" in line.cot or "\\boxed" in line.cot:
        problems.append("the chain of thought holds <think> or \\boxed: they are put around it")
    if "think>" in answer or "\\boxed" in answer:
        problems.append("the answer holds <think> or \\boxed: they are put around it")
    if not _braces_balance(answer):
        problems.append("the answer's braces { } do not balance, so it cannot stand in \\boxed{}")
    for name, value in (("profile", line.profile), ("history", line.history)):
        if value and task and f"${name}" not in task.prompt.template.replace("{", ""):
            problems.append(f"{name} has no effect: the template of [prompt] has no ${name}")
    return problems


def _braces_balance(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _split_problems(task: Task, entries: list[Entry]) -> list[Problem]:
    said = [entry for entry in entries if entry.line.split]
    if not said:
        if len(entries) < 2:
            return [Problem(EXAMPLES, 0, "at least two examples are needed: one is kept for test")]
        return []
    if len(said) < len(entries):
        return [
            Problem(EXAMPLES, entry.line_number, 'no "split", but other examples have one')
            for entry in entries
            if not entry.line.split
        ]
    missing = {"train", "test"} - {entry.line.split for entry in said}
    if missing:
        return [Problem(EXAMPLES, 0, f'no example has "split": "{missing.pop()}"')]
    if task.split.allow_shared_images:
        return []
    train: Mapping[bytes, int] = {
        image: entry.line_number
        for entry in reversed(said)
        if entry.line.split == "train"
        for image in entry.images
    }
    return [
        Problem(
            EXAMPLES,
            entry.line_number,
            f"a picture of this test example is also in the training example of line {train[image]}"
            " (split.allow_shared_images = true if it must be)",
        )
        for entry in said
        if entry.line.split == "test"
        for image in entry.images
        if image in train
    ]


def _override_problems(
    task: Task, policy: Policy, entries: list[Entry], changed: Policy, held_out: list[Entry]
) -> list[Problem]:
    """The changed policy must be another one, and its pictures must not be trained on."""
    problems = []
    if changed == policy:
        problems.append(Problem(f"{OVERRIDE}/{POLICY}", 0, f"the same as {POLICY}: change a rule"))
    if task.split.allow_shared_images:
        return problems
    trained = {
        image: entry.line_number
        for entry in reversed(entries)
        if entry.line.split == "train"
        for image in entry.images
    }
    return problems + [
        Problem(
            f"{OVERRIDE}/{EXAMPLES}",
            entry.line_number,
            f"a picture of this example is also in the training example of line {trained[image]}",
        )
        for entry in held_out
        for image in entry.images
        if image in trained
    ]


def _function_problems(task: Task, root: Path, entries: list[Entry], file: str) -> list[Problem]:
    """The gold answers as the user's function grades them: it must call each of them right."""
    if not isinstance(task.answer, Python):
        return []
    form = task.answer
    try:
        verdicts = call_user_function(
            str(_inside(root, form.file)),
            form.function,
            form.time_limit_s,
            [
                {
                    "answer": entry.answer,
                    "gold": entry.answer,
                    "example": facts(entry.example_id, entry.line),
                }
                for entry in entries
            ],
        )
    except ValueError as error:
        return [Problem(form.file, 0, str(error))]
    problems = []
    for entry, verdict in zip(entries, verdicts, strict=True):
        if verdict.error or verdict.score < 1.0:
            why = verdict.error or f"scores it {verdict.score:g}, not 1"
            message = f"{form.file} on the gold answer '{entry.answer}': {why}"
            problems.append(Problem(file, entry.line_number, message))
    return problems


def facts(example_id: str, line: Line) -> dict[str, Any]:
    """What a grading function is told of an example."""
    return {
        "id": example_id,
        "query": line.query,
        "profile": dict(line.profile),
        "history": [turn.model_dump() for turn in line.history],
    }


def function_form(form: Python, root: Path) -> dict[str, Any]:
    """The form of a Python function as it goes into an Example: its file found and its checksum."""
    path = _inside(root, form.file)
    return form.model_dump() | {"file": str(path), "sha256": file_sha256(path)}
