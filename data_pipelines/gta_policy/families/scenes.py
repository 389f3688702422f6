"""Families whose images are scenes: CLEVR solids, streets, floor plans, landscapes, postcards.

Next: data_pipelines/gta_policy/synthetic.py
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from PIL import Image

from data_pipelines.clevr.renderer import render_masks, render_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import Scene, SceneObject
from data_pipelines.gta_policy.drawing import (
    Box,
    Canvas,
    ellipse,
    encode_jpeg,
    finish,
    gradient,
    line,
    make_canvas,
    polygon,
    rectangle,
    write,
)
from data_pipelines.gta_policy.families.draft import (
    INKS,
    POSITIONS,
    Draft,
    Name,
    add_text,
    box_text,
    calculate,
    count,
    find_box,
    made_of,
    number_text,
    ocr,
    pick,
    pick_some,
    search,
)
from data_pipelines.gta_policy.tasks import Step

CLEVR_SIZE = (320, 240)
MAX_SOLIDS = 6  # the renderer is compiled once for scenes of up to six
# color name -> paint
PAINTS = {
    "red": "#b8322a", "blue": "#2c5f9e", "green": "#3c7a41", "yellow": "#e3b62f",
    "white": "#f2efe6", "brown": "#7a4a2b",
}  # fmt: skip
WALLS = ("#d9b48f", "#c9c4b5", "#e8d6a8", "#b9c7cf", "#d8a39a", "#cfd8b8")
ROOMS = ("Kitchen", "Bedroom", "Bathroom", "Living room", "Study", "Hall")
# city, country, four things to see there
CITIES = (
    ("Lisbon", "Portugal", ("Belem Tower", "Alfama", "Jeronimos Monastery", "Tram 28")),
    ("Rome", "Italy", ("the Colosseum", "the Roman Forum", "the Trevi Fountain", "the Pantheon")),
    ("Kyoto", "Japan", ("Fushimi Inari", "Kinkaku-ji", "Gion", "the Arashiyama bamboo grove")),
    ("Cairo", "Egypt", ("the pyramids", "the Egyptian Museum", "Khan el-Khalili", "the Citadel")),
    ("Paris", "France", ("the Eiffel Tower", "the Louvre", "Notre-Dame", "Montmartre")),
    ("Prague", "Czechia", ("Charles Bridge", "Prague Castle", "Old Town Square", "Petrin Hill")),
    ("Athens", "Greece", ("the Acropolis", "Plaka", "the Ancient Agora", "Lycabettus Hill")),
    ("Istanbul", "Turkey", ("Hagia Sophia", "the Blue Mosque", "the Grand Bazaar", "Galata Tower")),
)  # fmt: skip
OPPOSITE = {"summer": "winter", "winter": "summer", "spring": "autumn", "autumn": "spring"}


@dataclasses.dataclass(frozen=True)
class Season:
    """Colours of a landscape."""

    sky: tuple[str, str]
    ground: str
    hills: tuple[str, str]
    leaves: str


SEASONS = {
    "summer": Season(("#4f9fdc", "#cfe8f7"), "#6fae45", ("#5f9650", "#7fb063"), "#2f7a35"),
    "winter": Season(("#9fb4c7", "#e6edf2"), "#f2f5f7", ("#d3dde5", "#e6edf2"), "#dfe9ee"),
    "spring": Season(("#7cc0ea", "#eaf6fb"), "#9ccf6a", ("#86b873", "#a9d08c"), "#f0a6c0"),
    "autumn": Season(("#d9a05b", "#f7e3bd"), "#b99a4f", ("#a6743a", "#c79a55"), "#c9541f"),
}


def clevr_count(rng: np.random.Generator, name: Name) -> Draft:
    """A CLEVR scene: how many more of these than of those?"""
    scene, image, _ = _make_clevr(rng, 4)
    groups = _phrases(scene.objects)
    least = min(number for _, number in groups)
    first, more = pick(rng, [group for group in groups if group[1] > least] or groups)
    second, less = pick(rng, [group for group in groups if group[1] < more] or groups)
    steps = (
        count(name(0), first, more, f"First the number of {first}s is needed."),
        count(name(0), second, less,
              f"The number of {first}s is {more}; now each {second} is counted."),
        calculate(f"{more} - {less}", more - less,
                  f"The numbers are {more} and {less}; their difference is asked."),
    )  # fmt: skip
    request = f"How many more {first}s than {second}s does this picture show?"
    return Draft((image,), request, steps, str(more - less))


def clevr_box(rng: np.random.Generator, name: Name) -> Draft:
    """A CLEVR scene: mark one solid, or say what it is made of."""
    while True:
        scene, image, boxes = _make_clevr(rng, 3)
        hidden = pick(rng, ("material", "size", "color", "shape"))
        named = [key for key in ("size", "color", "material", "shape") if key != hidden]
        found = [_phrase(o, named) for o in scene.objects]
        single = [i for i, phrase in enumerate(found) if found.count(phrase) == 1]
        if single:
            break
    i = int(pick(rng, single))
    thing, box = scene.objects[i], boxes[i]
    score = int(rng.integers(71, 99))
    if rng.random() < 0.5:
        locate = find_box(
            name(0), found[i], box, score, f"The {found[i]} must be found before it is described."
        )
        value = getattr(thing, hidden)
        arguments = {"image": name(0), "bbox": box_text(box), "attribute": hidden}
        tell = Step("RegionAttributeDescription", arguments,
                    f"The {found[i]} is at {box_text(box)}; its {hidden} is asked.",
                    f"The {hidden} is {value}.")  # fmt: skip
        question = {
            "material": f"Is the {found[i]} made of rubber or of metal?",
            "size": f"Is the {found[i]} a small or a large one?",
            "color": f"Which color does the {found[i]} have?",
            "shape": f"Which shape does the {found[i]} have?",
        }[hidden]
        return Draft((image,), question, (locate, tell), value)
    label = pick(rng, ("target", "this one", "pick me", "sample", "check"))
    locate = find_box(
        name(0), found[i], box, score, f"The {found[i]} must be found before it can be marked."
    )
    arguments = {"image": name(0), "bbox": box_text(box), "annotation": label}
    why = f"The {found[i]} is at {box_text(box)}; the box is drawn there."
    mark = Step("DrawBox", arguments, why, made_of(name(0)))
    request = f'Draw a box around the {found[i]} and label it "{label}".'
    return Draft((image,), request, (locate, mark), "Here is the marked image.")


def street(rng: np.random.Generator, name: Name) -> Draft:
    """A row of houses with numbers: which colour has a door? Mark a house. Count windows."""
    houses = int(rng.integers(3, 5))
    doors = pick_some(rng, tuple(PAINTS), houses)
    start = int(rng.integers(1, 40))
    numbers = [start + 2 * i for i in range(houses)]
    canvas, outlines, windows = _draw_street(rng, doors, numbers)
    i = int(rng.integers(houses))
    score = int(rng.integers(71, 99))
    kind = int(rng.integers(3))
    if kind == 0:
        text = f"house with the number {numbers[i]}"
        box = box_text(outlines[i])
        steps = (
            find_box(name(0), text, outlines[i], score, f"The {text} must be found first."),
            Step(
                "RegionAttributeDescription",
                {"image": name(0), "bbox": box, "attribute": "door color"},
                f"The house is at {box}; the color of its door is asked.",
                f"The door color is {doors[i]}.",
            ),
        )
        request = f"Which color does the door of the house with the number {numbers[i]} have?"
        return Draft((finish(canvas),), request, steps, doors[i])
    if kind == 1:
        text = f"house with the {doors[i]} door"
        box = box_text(outlines[i])
        label = pick(rng, ("for sale", "my house", "visit", "sold"))
        steps = (
            find_box(name(0), text, outlines[i], score, f"The {text} must be found to be marked."),
            Step("DrawBox", {"image": name(0), "bbox": box, "annotation": label},
                 f"The {text} is at {box}; the box is drawn there.", made_of(name(0))),
        )  # fmt: skip
        request = f'Mark the {text} in this street with a box that says "{label}".'
        return Draft((finish(canvas),), request, steps, "Here is the marked image.")
    price = int(rng.integers(3, 12))
    total = sum(windows)
    steps = (
        count(name(0), "window", total, "The number of windows is needed first."),
        calculate(
            f"{total} * {price}",
            total * price,
            f"There are {total} windows, each costs {price} to clean.",
        ),
    )
    request = f"Cleaning one window costs {price} euros. What do all windows in this street cost?"
    return Draft((finish(canvas),), request, steps, str(total * price))


def floor_plan(rng: np.random.Generator, name: Name) -> Draft:
    """A floor plan with measures: what does a new floor cost?"""
    canvas, measures = _draw_floor_plan(rng)
    room = pick(rng, tuple(measures))
    wide, deep = measures[room]
    read = ocr(name(0), canvas.lines, "The measures of the rooms are written in the plan.")
    if rng.random() < 0.5:
        price = int(rng.integers(15, 60))
        value = round(wide * deep * price, 2)
        request = (
            f"What does a new floor for the {room.lower()} cost at {price} euros a square metre?"
        )
        why = f"The {room.lower()} measures {wide:.1f} x {deep:.1f} m at {price} a square metre."
        steps = (read, calculate(f"{wide:.1f} * {deep:.1f} * {price}", value, why))
        return Draft((finish(canvas),), request, steps, number_text(value))
    area = round(wide * deep, 2)
    where, ink = pick(rng, tuple(POSITIONS)), pick(rng, INKS)
    why = f"The {room.lower()} measures {wide:.1f} x {deep:.1f} m."
    steps = (
        read,
        calculate(f"{wide:.1f} * {deep:.1f}", area, why),
        add_text(name(0), number_text(area), where, ink,
                 f"The area is {number_text(area)}; it is to be written in {ink} at the {where}."),
    )  # fmt: skip
    request = (
        f"Write the area of the {room.lower()} in square metres, as a plain number, in {ink} at the"
        f" {where} of this plan."
    )
    return Draft((finish(canvas),), request, steps, number_text(area))


def landscape(rng: np.random.Generator, name: Name) -> Draft:
    """A landscape in one season: turn it into the opposite one, or make a new picture of it."""
    season = pick(rng, tuple(SEASONS))
    canvas, things = _draw_landscape(rng, SEASONS[season])
    listed = ", ".join(things[:-1]) + f" and {things[-1]}"
    seen = Step(
        "ImageDescription", {"image": name(0)}, "What the picture shows must be known first.",
        f"A drawn {season} landscape with {listed}.",
    )  # fmt: skip
    if rng.random() < 0.6:
        other = OPPOSITE[season]
        change = Step(
            "ImageStylization",
            {"image": name(0), "instruction": f"turn the {season} into {other}"},
            f"The picture shows {season}; the opposite season is {other}.", made_of(name(0)),
        )  # fmt: skip
        request = "Show me this landscape in the opposite season."
        return Draft((finish(canvas),), request, (seen, change), "Here is the changed image.")
    time = pick(rng, ("night", "sunset", "foggy morning"))
    keywords = ", ".join([*things, season, time])
    make = Step(
        "TextToImage", {"keywords": keywords},
        f"A new picture of {listed} in {season} is asked, at {time}.", made_of(name(0)),
    )  # fmt: skip
    moment = {"night": "at night", "sunset": "at sunset", "foggy morning": "on a foggy morning"}[
        time
    ]
    request = f"Make a new picture with the same things and the same season as here, but {moment}."
    return Draft((finish(canvas),), request, (seen, make), "Here is the new image.")


def postcard(rng: np.random.Generator, name: Name) -> Draft:
    """A postcard: what should I see there? An open-ended question."""
    city, country, sights = pick(rng, CITIES)
    canvas = _draw_postcard(rng, city, country)
    days = int(rng.integers(2, 5))
    results = (
        f"{days} days in {city} - Start with {sights[0]} and {sights[1]}.",
        f"What to see in {city} - Do not miss {sights[1]} and {sights[2]}.",
        f"{city} for first visitors - Many like {sights[3]} best.",
        f"{country} travel blog - Our walk in {city}: {sights[0]}, {sights[2]}, {sights[3]}.",
    )
    steps = [
        ocr(name(0), canvas.lines, "The name of the city is written on the postcard."),
        search(f"what to see in {city} in {days} days", results,
               f"The postcard comes from {city}; ideas for a visit must be looked up.",
               open_ended=True),
    ]  # fmt: skip
    request = f"What would you recommend me to see in {days} days in the city on this postcard?"
    last = f"In {city} see {', '.join(sights)}."
    if rng.random() < 0.5:
        request += " Then make a poster of the first two sights that you find."
        keywords = f"{sights[0]}, {sights[1]}, {city}, travel poster"
        steps.append(
            Step("TextToImage", {"keywords": keywords},
                 f"The first two sights are {sights[0]} and {sights[1]}; the poster shows them.",
                 made_of(name(0)))
        )  # fmt: skip
    return Draft((finish(canvas),), request, tuple(steps), last, open_ended=True)


def _make_clevr(rng: np.random.Generator, fewest: int) -> tuple[Scene, bytes, list[Box]]:
    """A scene, its picture, and the box of what is visible of each object."""
    width, height = CLEVR_SIZE
    (scene,) = sample_scenes(
        int(rng.integers(2**31)),
        0,
        1,
        min_objects=fewest,
        max_objects=MAX_SOLIDS,
        width=width,
        height=height,
    )
    (pixels,) = render_scenes([scene], width=width, height=height)
    (mask,) = render_masks([scene], width=width, height=height)
    boxes = []
    for i in range(len(scene.objects)):
        rows, columns = np.nonzero(mask == i + 1)  # 0 is the background
        boxes.append(
            (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        )
    return scene, encode_jpeg(Image.fromarray(pixels)), boxes


def _phrase(thing: SceneObject, named: list[str]) -> str:
    """`large yellow metal cube`, with only the named attributes."""
    words = [getattr(thing, key) for key in named]
    return " ".join(words if "shape" in named else [*words, "object"])


def _phrases(objects: tuple[SceneObject, ...]) -> list[tuple[str, int]]:
    """Descriptions by one or two attributes, and how many objects fit each."""
    groups: dict[str, int] = {}
    for keys in (
        ["color"],
        ["material"],
        ["size"],
        ["shape"],
        ["material", "shape"],
        ["size", "shape"],
    ):
        for thing in objects:
            text = _phrase(thing, keys)
            groups[text] = groups.get(text, 0) + 1
    return list(groups.items())


def _draw_street(
    rng: np.random.Generator, doors: list[str], numbers: list[int]
) -> tuple[Canvas, list[Box], list[int]]:
    """The street, and per house: outline, number of windows."""
    wide = 132
    canvas = make_canvas(wide * len(doors) + 24, 320, "#bcdcee")
    gradient(canvas, "#8cc3e8", "#e9f4fa", 0, 240)
    rectangle(canvas, (0, 268, wide * len(doors) + 24, 320), "#8a8d90")
    rectangle(canvas, (0, 256, wide * len(doors) + 24, 270), "#c9c5bb")
    for x in range(10, wide * len(doors) + 24, 46):
        rectangle(canvas, (x, 295, x + 24, 298), "#f0eee4")
    walls = pick_some(rng, WALLS, len(doors))
    outlines, windows = [], []
    for i, (door, number) in enumerate(zip(doors, numbers, strict=True)):
        x, floors = 14 + wide * i, int(rng.integers(1, 3))
        top = 256 - 62 - 62 * floors
        roof = pick(rng, ("#7d3b2a", "#54433a", "#5b6470", "#8d5a3a"))
        rectangle(canvas, (x + 4, top, x + wide - 12, 256), walls[i], outline="#6e675e", width=1)
        polygon(canvas, ((x, top), (x + wide - 8, top), (x + (wide - 8) / 2, top - 44)), roof)
        shown = 0
        for floor in range(floors):
            for column in range(2):
                wx, wy = x + 18 + 50 * column, top + 14 + 62 * floor
                rectangle(canvas, (wx, wy, wx + 34, wy + 38), "#cfe6f2", outline="white", width=3)
                line(canvas, ((wx + 17, wy), (wx + 17, wy + 38)), "white", width=2)
                shown += 1
        windows.append(shown)
        left = bool(rng.integers(2))
        dx = x + (18 if left else 62)
        rectangle(canvas, (dx, 198, dx + 34, 256), PAINTS[door], outline="#4a443d", width=1.5)
        ellipse(canvas, (dx + 26, 226, dx + 30, 230), "#e8d27a")
        px = x + (82 if left else 32)
        rectangle(canvas, (px - 15, 204, px + 15, 224), "white", outline="#33414f", width=1)
        write(canvas, (px, 214), str(number), 14, font="bold", anchor="mm")
        outlines.append((x, top - 44, x + wide - 8, 256))
    return canvas, outlines, windows


def _draw_floor_plan(rng: np.random.Generator) -> tuple[Canvas, dict[str, tuple[float, float]]]:
    """A plan of two rows of rooms at 46 px a metre; the measures are those of the drawing."""
    scale = 46
    tops = [float(v) / 2 for v in rng.integers(6, 9, size=2)]  # depths of the rows, metres
    wide = 9.0
    names = pick_some(rng, ROOMS, 5)
    cuts = [
        (3.0 + float(rng.integers(0, 3)) / 2, 6.0 + float(rng.integers(0, 2)) / 2),
        (4.0 + float(rng.integers(0, 4)) / 2,),
    ]
    canvas = make_canvas(round(wide * scale) + 60, round(sum(tops) * scale) + 60, "#fdfcf8")
    measures: dict[str, tuple[float, float]] = {}
    y = 30.0
    for depth, inner in zip(tops, cuts, strict=True):
        edges = [0.0, *inner, wide]
        for left, right in itertools.pairwise(edges):
            room = names[len(measures)]
            box = (30 + left * scale, y, 30 + right * scale, y + depth * scale)
            fill = pick(rng, ("#f3ead7", "#e6eef2", "#eaf0e0", "#f2e6e3", "#ece8f2"))
            rectangle(canvas, box, fill, outline="#2b2b2b", width=4)
            middle, center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            write(canvas, (middle, center - 11), room, 15, font="bold", anchor="mm")
            write(
                canvas,
                (middle, center + 12),
                f"{right - left:.1f} x {depth:.1f} m",
                13,
                anchor="mm",
            )
            door = box[0] + 22
            edge = box[3] if y == 30.0 else box[1]
            rectangle(canvas, (door, edge - 3, door + 30, edge + 3), fill)
            measures[room] = (right - left, depth)
        y += depth * scale
    return canvas, measures


def _draw_landscape(rng: np.random.Generator, season: Season) -> tuple[Canvas, list[str]]:
    """A landscape and the names of what stands in it."""
    width, height = 480, 320
    canvas = make_canvas(width, height)
    gradient(canvas, season.sky[0], season.sky[1], 0, 190)
    things = []
    if rng.random() < 0.6:
        x = float(rng.uniform(60, 420))
        ellipse(canvas, (x - 24, 26, x + 24, 74), "#fff1b0")
        things.append("the sun")
    for layer, color in enumerate(season.hills):
        base = 150 + 28 * layer
        phase, reach = float(rng.uniform(0, 6.3)), float(rng.uniform(16, 30))
        ridge = [
            (float(x), base - reach * float(np.sin(x / (70 + 25 * layer) + phase)))
            for x in range(0, width + 1, 6)
        ]
        polygon(canvas, [(0, height), *ridge, (width, height)], color)
    rectangle(canvas, (0, 206, width, height), season.ground)
    if rng.random() < 0.6:
        x = float(rng.uniform(90, 330))
        ellipse(
            canvas, (x, 246, x + 150, 298), "#5fa3c7" if season.ground != "#f2f5f7" else "#cfe3ee"
        )
        ellipse(
            canvas,
            (x + 18, 252, x + 112, 272),
            "#8fc3dd" if season.ground != "#f2f5f7" else "#e4f0f6",
        )
        things.append("a lake")
    spots = pick_some(rng, [(40 + 58 * i, 226 + 9 * (i % 3)) for i in range(8)], 6)
    if rng.random() < 0.7:
        (x, y), wall = spots.pop(), pick(rng, ("red", "white", "blue"))
        paint = {"red": "#b23b2e", "white": "#f3f0e8", "blue": "#3f6fa3"}[wall]
        rectangle(canvas, (x - 24, y - 32, x + 24, y), paint, outline="#5b5149", width=1)
        snow = season.ground == "#f2f5f7"
        polygon(
            canvas,
            ((x - 31, y - 31), (x + 31, y - 31), (x, y - 60)),
            "#eef3f6" if snow else "#5a3a2a",
        )
        rectangle(canvas, (x - 6, y - 18, x + 6, y), "#4a3524")
        for wx in (x - 18, x + 10):
            rectangle(canvas, (wx, y - 24, wx + 8, y - 15), "#ffe79a", outline="white", width=1)
        things.append(f"a {wall} house")
    trees = int(rng.integers(2, 5))
    for x, y in sorted(spots[:trees], key=lambda spot: spot[1]):
        rectangle(canvas, (x - 4, y - 22, x + 4, y + 4), "#6b4a2f")
        for dx, dy, r in ((-14, -34, 16), (14, -34, 16), (0, -50, 19), (0, -32, 16)):
            ellipse(canvas, (x + dx - r, y + dy - r, x + dx + r, y + dy + r), season.leaves)
    things.append({2: "two trees", 3: "three trees", 4: "four trees"}[trees])
    return canvas, things


def _draw_postcard(rng: np.random.Generator, city: str, country: str) -> Canvas:
    """A skyline at dusk with the city's name; which skyline it is stays open."""
    canvas = make_canvas(480, 320, "#f8f4ea")
    sky = pick(rng, (("#34558b", "#f5b971"), ("#5b86b8", "#f7e2c4"), ("#6a4c93", "#ffb5a7")))
    gradient(canvas, sky[0], sky[1], 14, 306)
    ellipse(canvas, (382, 158, 440, 216), "#fff3cf")
    for layer, color in enumerate(("#6f6f8f", "#3d3d5c", "#23233b")):
        x = 10.0
        while x < 470:
            wide, tall = float(rng.uniform(22, 52)), float(rng.uniform(70, 140) - 28 * layer)
            right, top = min(x + wide, 470), 306 - tall
            rectangle(canvas, (x, top, right, 306), color)
            roof = int(rng.integers(4))
            if roof == 0:
                polygon(canvas, ((x, top), (right, top), ((x + right) / 2, top - 24)), color)
            elif roof == 1:
                ellipse(canvas, (x, top - (right - x) / 2, right, top + (right - x) / 2), color)
            if layer == 2:
                for wx in np.arange(x + 5, right - 6, 9):
                    for wy in np.arange(top + 8, 296, 13):
                        if rng.random() < 0.4:
                            rectangle(canvas, (wx, wy, wx + 3.5, wy + 5), "#ffd873")
            x += wide
    for edge in ((0, 0, 480, 14), (0, 306, 480, 320), (0, 0, 14, 320), (466, 0, 480, 320)):
        rectangle(canvas, edge, "#f8f4ea")
    write(canvas, (240, 62), "Greetings from", 22, font="italic", color="white", anchor="mm")
    write(canvas, (240, 104), city.upper(), 42, font="serif bold", color="white", anchor="mm")
    write(canvas, (240, 142), country, 19, font="italic", color="white", anchor="mm")
    return canvas
