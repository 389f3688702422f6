"""Make the folder of the returns desk: photos, examples with answers, policy and task.

    python -m examples.returns_desk.make --out runs/returns_desk
    python -m data_pipelines.build own --source runs/returns_desk --out runs/returns_desk_shards

policy.md and task.toml are copied from here; the photos and examples.jsonl are drawn. override/
gets a policy of the same name with seven changed rules, and what is right under it for the last
fifth of the cases, which thereby become the test examples. Needs the `examples` extra (resvg). The
same seed gives the same folder for a given version of resvg.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.example import encode_png
from examples.returns_desk.draw import (
    BOXES,
    COLOURS,
    DAMAGES,
    GOODS,
    SEALS,
    Item,
    draw_detail,
    draw_photo,
)
from examples.returns_desk.judge import (
    CHANGED_RULES,
    DECISIONS,
    MEMBERSHIPS,
    RULES,
    Case,
    change_policy,
    judge,
    reasoning,
)

HERE = Path(__file__).parent
QUERIES = (
    "what does the desk decide?",
    "what should happen with the goods in the photo?",
    "which decision is right for this parcel?",
)
DETAILS = {  # the pictures of policy.md
    "scratch": Item("kettle", "red", "scratch", "whole", "none"),
    "crack": Item("mug", "blue", "crack", "whole", "none"),
    "stain": Item("sneaker", "green", "stain", "whole", "none"),
    "seal_whole": Item("backpack", "grey", "none", "whole", "none"),
    "seal_torn": Item("headphones", "yellow", "none", "torn", "none"),
}
JPEG_QUALITY = 90


def make_folder(folder: Path, *, count: int, cot: int, seed: int) -> Counter:
    """Write everything; returns how often each decision is the answer.

    Args:
        folder: must not exist, or be empty.
        count: examples in all, training and test.
        cot: how many of them have a chain of thought.
        seed: of the cases and of how they are drawn.

    Raises:
        ValueError: the folder is not empty, or `cot` exceeds `count`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; delete it or choose another folder")
    if not 1 <= cot <= count:
        raise ValueError(f"--cot {cot} is not in 1..{count} (--count)")
    (folder / "pictures").mkdir(parents=True)
    (folder / "photos").mkdir()
    for name in ("policy.md", "task.toml"):
        shutil.copyfile(HERE / name, folder / name)
    write_details(folder / "pictures")
    (folder / "override").mkdir()
    changed = change_policy((HERE / "policy.md").read_text()).replace("](", "](../")
    (folder / "override" / "policy.md").write_text(changed)
    lines, held_out = [], []
    for number, case in enumerate(sample_cases(count, seed)):
        name = f"r{number:04d}"
        buffer = io.BytesIO()
        photo = Image.fromarray(draw_photo(case.item, seed * 1_000_003 + number))
        photo.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        (folder / "photos" / f"{name}.jpg").write_bytes(buffer.getvalue())
        decision, _ = judge(case)
        line = {
            "id": name,
            "images": [f"photos/{name}.jpg"],
            "query": QUERIES[number % len(QUERIES)],
            "profile": {"days": case.days, "membership": case.membership},
            "answer": decision,
        }
        # spread evenly over the cases, so that every decision has some
        if (number + 1) * cot // count > number * cot // count:
            line["cot"] = reasoning(case)
        lines.append(line)
        if number >= count - count // 5:
            image = {"images": [f"../{line['images'][0]}"]}
            answer = {"answer": judge(case, CHANGED_RULES)[0]}
            held_out.append({k: v for k, v in line.items() if k != "cot"} | image | answer)
    _write_lines(folder / "examples.jsonl", lines)
    _write_lines(folder / "override" / "examples.jsonl", held_out)
    return Counter(line["answer"] for line in lines)


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sample_cases(count: int, seed: int) -> list[Case]:
    """Random cases; each decision is drawn about equally often."""
    rng = np.random.default_rng([seed, 0])
    cases = []
    for number in range(count):
        wanted = DECISIONS[number % len(DECISIONS)]
        while judge(case := sample_case(rng))[0] != wanted:
            pass
        cases.append(case)
    return [cases[i] for i in rng.permutation(count)]


def sample_case(rng: np.random.Generator) -> Case:
    """One case; three in four are in time."""
    membership = str(rng.choice(MEMBERSHIPS))
    limit = RULES.limit_days(membership)
    days = (
        rng.integers(limit + 1, limit + 40) if rng.random() < 0.25 else rng.integers(1, limit + 1)
    )
    item = Item(
        goods=str(rng.choice(GOODS)),
        colour=str(rng.choice(list(COLOURS))),
        damage=str(rng.choice(DAMAGES)),
        seal=str(rng.choice(SEALS)),
        box=str(rng.choice(BOXES)),
    )
    return Case(item, int(days), membership)


def write_details(folder: Path) -> None:
    """The policy's own pictures."""
    for name, item in DETAILS.items():
        (folder / f"{name}.png").write_bytes(encode_png(draw_detail(item, 1)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the folder of the returns desk.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=480, help="examples in all")
    parser.add_argument("--cot", type=int, default=240, help="examples with a chain of thought")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        decisions = make_folder(
            options.out, count=options.count, cot=options.cot, seed=options.seed
        )
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{options.out}: {dict(sorted(decisions.items()))}")


if __name__ == "__main__":
    main()
