"""GTA's release folder -> tasks: dataset.json, toolmeta.json, image/.

    {"0": {"tools": [...], "files": [{"type": "image", "path": "image/image_1.jpg", "url": ...}],
           "dialogs": [{"role": "user", "content": ...},
                       {"role": "assistant", "tool_calls": [{"type": "function", "function":
                           {"name": "OCR", "arguments": {...}}}], "thought": ...},
                       {"role": "tool", "name": "OCR", "content": {"type": "text", "content": ...}},
                       ..., {"role": "assistant", "content": ...}],
           "gt_answer": {"whitelist": [[...]], "blacklist": ...} | [three texts] | null}, ...}

Every call of a dialog is one step. GoogleSearch's k follows the policy: a question with one right
answer (`gt_answer` is an object) is not open-ended, every other is. A record without calls has no
step and gives no task.

Source: open-compass/GTA (Apache-2.0), layout of gta_dataset v0.1.0; Wang et al., arXiv:2407.08713.
Next: data_pipelines/gta_policy/dataset.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.example import decode_image
from data_pipelines.gta_policy.catalogue import K_CLOSED, K_OPEN, TOOLS, find_argument_problems
from data_pipelines.gta_policy.tasks import NamedImage, Step, Task

MAX_IMAGE_BYTES = 64_000_000  # a larger file is refused before it is read
SHOWN_PROBLEMS = 50


def load_tasks(
    folder: str | Path, on_task: Callable[[Task], None] = lambda task: None
) -> list[Task]:
    """All tasks of a release folder, in the order of its keys.

    Args:
        folder: the folder with dataset.json, toolmeta.json and image/.
        on_task: called with every task that is read.

    Raises:
        ValueError: with every problem of the folder, each with its file and record.
    """
    folder = Path(folder).expanduser()
    records, problems = _read_object(folder / "dataset.json")
    described, found = _read_object(folder / "toolmeta.json")
    problems += found
    if problems:
        raise ValueError(_report(folder, problems))
    problems = list(_find_toolmeta_problems(described))
    tasks: list[Task] = []
    for key, record in records.items():
        found = list(_find_record_problems(record, described))
        images = []
        if not found:
            for name in dict.fromkeys(_image_paths(record)):
                data, problem = _read_image(folder, name)
                images.append(NamedImage(name, data))
                found += [problem] if problem else []
        problems += [f"dataset.json, record {key}: {problem}" for problem in found]
        if not found and (task := _make_task(key, record, tuple(images))):
            tasks.append(task)
            on_task(task)
    if problems:
        raise ValueError(_report(folder, problems))
    if not tasks:
        raise ValueError(f"{folder / 'dataset.json'} has no record with a tool call")
    return tasks


def _read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, and what is wrong with the file; a key that stands twice is an error."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the keys {twice} stand twice in one object")
        return dict(pairs)

    if not path.is_file():
        return {}, [
            f"{path.name} is missing; expected GTA's layout (dataset.json, toolmeta.json, image/)"
        ]
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        return {}, [f"{path.name} is no valid JSON: {error}"]
    if not isinstance(found, dict):
        return {}, [f"{path.name} is a {type(found).__name__}, expected an object"]
    return found, []


def _find_toolmeta_problems(described: dict[str, Any]) -> Iterator[str]:
    """Tools that the policy does not know, or whose arguments are others."""
    for name, entry in described.items():
        if name not in TOOLS:
            yield f"toolmeta.json: the policy has no tool {name!r}; it has {sorted(TOOLS)}"
            continue
        inputs = entry.get("inputs") if isinstance(entry, dict) else None
        if not isinstance(inputs, list):
            yield f"toolmeta.json: {name} has no list 'inputs'"
            continue
        given = {entry.get("name") for entry in inputs if isinstance(entry, dict)}
        wanted = {argument.name for argument in TOOLS[name].arguments}
        if given != wanted:
            yield (
                f"toolmeta.json: {name} has the arguments {sorted(map(str, given))}, the policy"
                f" describes {sorted(wanted)}"
            )


def _find_record_problems(record: Any, described: dict[str, Any]) -> Iterator[str]:
    """Everything that keeps one record from being read."""
    if not isinstance(record, dict):
        yield f"expected an object, got {type(record).__name__}"
        return
    files, dialogs = record.get("files"), record.get("dialogs")
    if not isinstance(files, list) or not files:
        yield "'files' must be a list with at least one image"
    else:
        for i, entry in enumerate(files):
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                yield f"files[{i}] needs a text 'path', got {entry!r}"
            elif entry.get("type") != "image":
                yield f"files[{i}] has the type {entry.get('type')!r}, expected 'image'"
    if not isinstance(dialogs, list) or not dialogs:
        yield "'dialogs' must be a list that starts with the user"
        return
    yield from _find_dialog_problems(dialogs, described)
    answer = record.get("gt_answer", "absent")
    if not (answer is None or isinstance(answer, dict | list)):
        yield f"'gt_answer' must be an object, a list or null, got {answer!r}"


def _find_dialog_problems(dialogs: list[Any], described: dict[str, Any]) -> Iterator[str]:
    """user, then call and return in turn, then the assistant's last word."""
    for i, turn in enumerate(dialogs):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("user", "assistant", "tool"):
            yield f"dialogs[{i}] has the role {role!r}, expected user, assistant or tool"
            return
    if dialogs[0]["role"] != "user" or not _is_text(dialogs[0].get("content")):
        yield "dialogs[0] must be the user's with a text 'content'"
    if dialogs[-1]["role"] != "assistant" or "tool_calls" in dialogs[-1]:
        yield f"dialogs[{len(dialogs) - 1}], the last, must be the assistant's answer"
    elif not _is_text(dialogs[-1].get("content")):
        yield f"dialogs[{len(dialogs) - 1}] has no answer: 'content' must be a text"
    for i, turn in enumerate(dialogs[1:-1], start=1):
        if i % 2 == 0:
            content = turn.get("content")
            if turn["role"] != "tool" or not isinstance(content, dict):
                yield f"dialogs[{i}] must be a tool's return with an object 'content'"
            elif not isinstance(content.get("content"), str):
                yield f"dialogs[{i}].content.content must be a text"
            continue
        call, problem = _read_call(turn)
        if call is None:
            yield f"dialogs[{i}] {problem}"
        elif call[0] not in TOOLS or call[0] not in described:
            where = "the policy" if call[0] not in TOOLS else "toolmeta.json"
            yield f"dialogs[{i}] calls {call[0]!r}, which {where} does not describe"
        else:
            yield from (f"dialogs[{i}]: {text}" for text in find_argument_problems(*call))


def _read_call(turn: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]] | None, str]:
    calls = turn.get("tool_calls")
    if turn["role"] != "assistant" or not isinstance(calls, list):
        return None, "must be the assistant's with 'tool_calls'"
    if len(calls) != 1:
        return None, f"has {len(calls)} tool calls, expected one"
    function = calls[0].get("function") if isinstance(calls[0], dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None, "has a tool call without function.name"
    if not isinstance(function.get("arguments"), dict):
        return None, "has a tool call whose arguments are no object"
    return (function["name"], function["arguments"]), ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _image_paths(record: dict[str, Any]) -> Iterator[str]:
    yield from (entry["path"] for entry in record["files"])


def _read_image(folder: Path, name: str) -> tuple[bytes, str]:
    """An image's bytes, or what is wrong with it; nothing outside the folder is read."""
    path = folder / name
    if PurePosixPath(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        return b"", f"{name!r} leaves the folder"
    if not path.is_file():
        return b"", f"the image {name!r} is missing"
    if path.stat().st_size > MAX_IMAGE_BYTES:
        return b"", f"{name!r} has {path.stat().st_size} bytes, the limit is {MAX_IMAGE_BYTES}"
    data = path.read_bytes()
    try:
        decode_image(data, name)
    except ValueError as error:
        return b"", str(error)
    return data, ""


def _make_task(key: str, record: dict[str, Any], images: tuple[NamedImage, ...]) -> Task | None:
    """A checked record as a Task; None when it has no call."""
    dialogs = record["dialogs"]
    open_ended = not isinstance(record.get("gt_answer"), dict)
    steps = []
    for call_turn, return_turn in zip(dialogs[1:-1:2], dialogs[2:-1:2], strict=True):
        function = call_turn["tool_calls"][0]["function"]
        arguments = dict(function["arguments"])
        if function["name"] == "GoogleSearch":  # calling rule of the policy
            arguments["k"] = K_OPEN if open_ended else K_CLOSED
        thought = " ".join((call_turn.get("thought") or "").split())
        thought = thought or f"The next tool that helps is {function['name']}."
        returned = return_turn["content"]["content"]
        steps.append(Step(function["name"], arguments, thought, returned))
    if not steps:
        return None
    request, answer = dialogs[0]["content"], dialogs[-1]["content"]
    return Task(f"gta/{key}", "official", images, request, tuple(steps), answer, open_ended)


def _report(folder: Path, problems: list[str]) -> str:
    shown = problems[:SHOWN_PROBLEMS]
    rest = len(problems) - len(shown)
    more = [f"... and {rest} more"] if rest else []
    return f"{len(problems)} problems in {folder}:\n" + "\n".join(f"- {p}" for p in shown + more)
