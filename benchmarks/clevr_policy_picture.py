"""Draw a -M policy with its pictures, and examples of every split, for docs/data_clevr_policy.md.

python -m benchmarks.clevr_policy_picture --out docs/pictures
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_pipelines.clevr_policy.dataset import ClevrPolicySettings, documents_of, make_range
from data_pipelines.example import IMAGE_MARK, Example, decode_image

SETTINGS = ClevrPolicySettings(
    variant="M", depth=2, policies=1, train_per_policy=1, cot_per_policy=1, test=1,
    override=1, cogent_b=1, more_objects=1, deeper=1, width=336, height=224,
)  # fmt: skip
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
TEXT_PX, LINE_PX, EDGE_PX = 15, 21, 16


def draw_document(example: Example, width: int) -> Image.Image:
    """The policy as it reads, its pictures in their places."""
    font = ImageFont.load_default(TEXT_PX)
    canvas = Image.new("RGB", (width, 2000), PAPER)
    pen = ImageDraw.Draw(canvas)
    pictures = [Image.fromarray(decode_image(png)) for png in example.policy_images]
    y = EDGE_PX
    for paragraph in example.policy_text.split("\n"):
        if IMAGE_MARK not in paragraph:
            for line in textwrap.wrap(paragraph, width // 8):
                pen.text((EDGE_PX, y), line, INK, font=font)
                y += LINE_PX
            continue
        before, after = paragraph.split(IMAGE_MARK)
        picture = pictures.pop(0)
        middle = y + picture.height // 2 - TEXT_PX // 2
        x = EDGE_PX + int(pen.textlength(before, font=font))
        pen.text((EDGE_PX, middle), before, INK, font=font)
        canvas.paste(picture, (x, y))
        pen.text((x + picture.width + 4, middle), after, INK, font=font)
        y += picture.height + 4
    return canvas.crop((0, 0, width, y + EDGE_PX))


def draw_question(title: str, example: Example, width: int) -> Image.Image:
    """An input image with its gold chain of thought and answer."""
    font, small = ImageFont.load_default(TEXT_PX), ImageFont.load_default(TEXT_PX - 3)
    image = Image.fromarray(decode_image(example.images[0]))
    canvas = Image.new("RGB", (width, 2000), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((EDGE_PX, EDGE_PX), f"{title}: {example.policy_name}", INK, font=font)
    canvas.paste(image, (EDGE_PX, EDGE_PX + LINE_PX))
    y = EDGE_PX + LINE_PX + image.height + 8
    thought = example.meta["gold_cot"].split("\n")
    if example.meta["depth"] > SETTINGS.depth:
        thought = [thought[0], "...", thought[-1]]
    for paragraph in thought:
        for line in textwrap.wrap(paragraph, width // 6):
            pen.text((EDGE_PX, y), line, FAINT, font=small)
            y += LINE_PX - 4
    pen.text((EDGE_PX, y + 2), f"answer: {example.answer}", INK, font=font)
    if "trained_answer" in example.meta:
        told = f"(as trained: {example.meta['trained_answer']})"
        pen.text((EDGE_PX + 120, y + 2), told, FAINT, font=font)
    return canvas.crop((0, 0, width, y + LINE_PX + EDGE_PX))


def beside(parts: list[Image.Image]) -> Image.Image:
    """Pictures next to each other, tops aligned."""
    canvas = Image.new("RGB", (sum(p.width for p in parts), max(p.height for p in parts)), PAPER)
    x = 0
    for part in parts:
        canvas.paste(part, (x, 0))
        x += part.width
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    wide = SETTINGS.width + 2 * EDGE_PX
    train = make_range(SETTINGS, "train", 0, 1)["cot"][0]
    page = beside([draw_document(train, 520), draw_question("train", train, wide)])
    page.save(folder / "clevr_policy_m.png", optimize=True)
    asked = [
        draw_question(name, make_range(SETTINGS, name, 0, 1)[name][0], wide)
        for name in ("override", "cogent_b", "more_objects", "deeper")
    ]
    beside(asked).save(folder / "clevr_policy_splits.png", optimize=True)
    for document in documents_of(SETTINGS, "train"):
        print(document.tree.name, [crop.thing for crop in document.crops])


if __name__ == "__main__":
    main()
