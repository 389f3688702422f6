"""Ask a model behind an OpenAI-compatible endpoint (vLLM, SGLang, a vendor), several at a time.

In: conversations in the form of the chat completions API. Out: replies as they come. Images travel
as data URLs. Needs the extra `openai`.

Source: the `openai` client.
Next: trimpi_jax/stages/make_cot.py
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.example import IMAGE_MARK, Example

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_RETRIES = 4  # of the client, with growing pauses: connections, 408, 409, 429 and 5xx
SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


class Reply(NamedTuple):
    """What came back. `problem` says why there is no text; `stopped` is False when cut off.

    The token counts are the endpoint's own, 0 where it does not tell them.
    """

    text: str
    stopped: bool
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how. The key comes from OPENAI_API_KEY; local servers need none."""

    base_url: str
    model: str
    temperature: float
    max_new_tokens: int
    concurrency: int
    timeout_s: float


def open_client(endpoint: Endpoint) -> Any:
    """The client of an endpoint.

    Raises:
        ImportError: the extra is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "asking an endpoint needs the client: pip install 'trimpi_jax[openai]'"
        ) from error
    return openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=os.environ.get(KEY_VARIABLE) or "none",
        max_retries=MAX_RETRIES,
        timeout=endpoint.timeout_s,
    )


def ask(
    client: Any, endpoint: Endpoint, conversations: Sequence[list[dict[str, Any]]], seed: int
) -> Iterator[tuple[int, Reply]]:
    """(place, reply) of every conversation, in the order in which the replies come.

    A conversation that the endpoint refuses or fails at gives a Reply with a problem.

    Raises:
        ValueError: the endpoint cannot be reached, or refuses the key or the model's name.
    """
    import openai

    def one(messages: list[dict[str, Any]]) -> Reply:
        try:
            response = client.chat.completions.create(
                model=endpoint.model,
                messages=messages,
                temperature=endpoint.temperature,
                max_tokens=endpoint.max_new_tokens,
                seed=seed,
            )
        except (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
        ) as error:
            raise ValueError(_why(endpoint, error)) from error
        except openai.APITimeoutError:
            return Reply("", False, "timeout")
        except openai.APIConnectionError as error:
            raise ValueError(_why(endpoint, error)) from error
        except openai.APIStatusError as error:
            return Reply("", False, f"http_{error.status_code}")
        except (openai.APIError, json.JSONDecodeError):  # a body that is no answer
            return Reply("", False, "bad_response")
        return _read(response)

    with concurrent.futures.ThreadPoolExecutor(endpoint.concurrency) as threads:
        running = {threads.submit(one, messages): i for i, messages in enumerate(conversations)}
        try:
            for future in concurrent.futures.as_completed(running):
                yield running[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def make_conversation(example: Example, instruction: str = "") -> list[dict[str, Any]]:
    """Policy, images and query of an Example as chat messages.

    A policy of text is the system message, as in our own prompts; one with pictures opens the
    user's message, since many endpoints take images from users only.
    """
    policy: list[dict[str, Any]] = []
    for number, piece in enumerate(example.policy_text.split(IMAGE_MARK)):
        if number:
            policy.append(_image(example.policy_images[number - 1]))
        if piece.strip():
            policy.append(_text(piece))
    user = [_image(image) for image in example.images]
    user.append(_text(f"{example.query}\n{instruction}" if instruction else example.query))
    if not policy:
        return [{"role": "user", "content": user}]
    if example.policy_images:
        return [{"role": "user", "content": [*policy, *user]}]
    system = {"role": "system", "content": example.policy_text}
    return [system, {"role": "user", "content": user}]


def _read(response: Any) -> Reply:
    """The first choice; a thought that the server has split off is put back into its tags."""
    if not getattr(response, "choices", None):
        return Reply("", False, "bad_response")
    choice = response.choices[0]
    text = choice.message.content or ""
    thought = getattr(choice.message, "reasoning_content", None)
    if thought and "<think>" not in text:
        text = f"<think>{thought}</think>{text}"
    usage = getattr(response, "usage", None)
    return Reply(
        text,
        choice.finish_reason != "length",
        "" if text else "empty",
        getattr(usage, "prompt_tokens", None) or 0,
        getattr(usage, "completion_tokens", None) or 0,
    )


def request_key(endpoint: Endpoint, messages: list[dict[str, Any]]) -> str:
    """A name of what is asked, equal for equal questions to the same model at the same place."""
    asked = [endpoint.base_url, endpoint.model, endpoint.temperature, endpoint.max_new_tokens]
    return hashlib.sha256(json.dumps([*asked, messages]).encode()).hexdigest()


def load_replies(path: Path) -> dict[str, Reply]:
    """Replies kept by `keep_reply`: key -> Reply; a line that a kill cut is left out."""
    kept: dict[str, Reply] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                key = entry.pop("key")
                kept[key] = Reply(**entry)
            except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
                continue
    return kept


def keep_reply(path: Path, key: str, reply: Reply) -> None:
    """Add a reply to the file, on a line of its own whatever the last line was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps({"key": key, **reply._asdict()}).encode() + b"\n")


def _why(endpoint: Endpoint, error: Exception) -> str:
    return (
        f"{endpoint.base_url}, model '{endpoint.model}': {error}. Is the server running, is the"
        f" name right, does it need a key in {KEY_VARIABLE}?"
    )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(encoded: bytes) -> dict[str, Any]:
    kind = next((k for start, k in SIGNATURES.items() if encoded.startswith(start)), "png")
    url = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
