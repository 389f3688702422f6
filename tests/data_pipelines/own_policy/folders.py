"""Small own-policy folders for tests."""

import io
import json

import numpy as np
from PIL import Image

TASK = 'name = "Desk"\n\n[answer]\nform = "choice"\nchoices = ["Yes", "No"]\n'


def png(number=0, size=(40, 30)):
    """A picture that differs by its number."""
    pixels = np.full((size[1], size[0], 3), 40 + number % 200, np.uint8)
    pixels[0, 0] = (number % 256, number // 256, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(folder, *, task=TASK, policy=None, lines=None, count=6):
    """A good folder, unless a part of it is given."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "task.toml").write_text(task)
    if policy is None:
        policy = "# Desk\n\nSay Yes if it looks like this:\n\n![good](pictures/good.png)\n"
    (folder / "policy.md").write_text(policy)
    (folder / "pictures" / "good.png").write_bytes(png(199))
    for i in range(count):
        (folder / "pictures" / f"{i}.png").write_bytes(png(i))
    if lines is None:
        lines = [example(i) for i in range(count)]
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "examples.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def example(number, **fields):
    """A good line."""
    line = {
        "id": f"e{number}",
        "images": [f"pictures/{number}.png"],
        "query": "Take it back?",
        "answer": "Yes" if number % 2 else "No",
    }
    return line | fields
