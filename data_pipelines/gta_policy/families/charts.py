"""Families whose images are charts, tables and mathematics.

Next: data_pipelines/gta_policy/families/scenes.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from data_pipelines.gta_policy.drawing import (
    Canvas,
    finish,
    line,
    make_canvas,
    rectangle,
    render_figure,
    write,
)
from data_pipelines.gta_policy.families.draft import (
    Draft,
    Name,
    calculate,
    made_of,
    ocr,
    pick,
    pick_some,
)
from data_pipelines.gta_policy.tasks import Step

# title, axis label, categories
BARS = (
    ("Books sold by shop", "books", ("North", "South", "East", "West", "Centre", "Harbour")),
    ("Visitors by museum", "visitors", ("Art", "Science", "History", "Railway", "Toy", "Sea")),
    ("Trees planted by school", "trees", ("Oakfield", "Hillside", "Lakeview", "Park", "Grove")),
    ("Bicycles rented by day", "bicycles", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")),
    ("Cakes baked by team", "cakes", ("Red", "Blue", "Green", "Yellow", "White")),
)
LINES = (
    ("Members of the chess club", "members"),
    ("Students of the music school", "students"),
    ("Electric cars in the town", "cars"),
    ("Volunteers of the library", "volunteers"),
    ("Bee colonies of the valley", "colonies"),
)
COLORS = ("#3274a1", "#e1812c", "#3a923a", "#c03d3e", "#9372b2", "#4c9f9f")
TOWNS = ("Bern", "Oslo", "Porto", "Ghent", "Graz", "Turku", "Cork", "Split")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def bar_chart(rng: np.random.Generator, name: Name) -> Draft:
    """A bar chart with its values: arithmetic on two bars, or another chart of the same data."""
    title, unit, categories = pick(rng, BARS)
    labels = [c for c in categories if c in pick_some(rng, categories, int(rng.integers(4, 6)))]
    values = [int(v) for v in rng.choice(np.arange(12, 99), size=len(labels), replace=False)]
    color = pick(rng, COLORS)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        bars = axes.bar(labels, values, color=color, width=0.65)
        axes.bar_label(bars, fontsize=11, padding=2)
        axes.set_title(title, fontsize=13)
        axes.set_ylabel(unit)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylim(0, 112)
        axes.spines[["top", "right"]].set_visible(False)

    image, lines = render_figure(480, 340, paint)
    read = ocr(
        name(0), lines, "Labels and values are written in the chart, so its text must be read."
    )
    if rng.random() < 0.4:
        command = _plot_code("bars", title, labels, values)
        why = (
            f"The values are {', '.join(f'{a} {v}' for a, v in zip(labels, values, strict=True))};"
        )
        step = Step(
            "Plot", {"command": command}, f"{why} a pie chart of them is asked.", made_of(name(0))
        )
        request = "Draw the data of this bar chart as a pie chart with the same title."
        return Draft((image,), request, (read, step), "Here is the pie chart.")
    if rng.random() < 0.5:
        a, b = (int(i) for i in rng.permutation(len(labels))[:2])
        if values[a] < values[b]:
            a, b = b, a
        request = f"By how many {unit} is {labels[a]} ahead of {labels[b]} in this chart?"
        step = calculate(
            f"{values[a]} - {values[b]}",
            values[a] - values[b],
            f"{labels[a]} has {values[a]} and {labels[b]} has {values[b]}.",
        )
    else:
        request = (
            f"What is the mean number of {unit} over all bars of this chart, rounded to two digits?"
        )
        mean = round(sum(values) / len(values), 2)
        added = " + ".join(map(str, values))
        step = calculate(
            f"round(({added}) / {len(values)}, 2)",
            mean,
            f"There are {len(values)} bars; their mean is asked.",
        )
    return Draft((image,), request, (read, step), step.returned)


def line_chart(rng: np.random.Generator, name: Name) -> Draft:
    """A line chart with its values: growth between two years."""
    title, unit = pick(rng, LINES)
    first = int(rng.integers(2012, 2020))
    years = [str(first + i) for i in range(int(rng.integers(4, 7)))]
    values = [
        int(v) for v in np.cumsum(rng.integers(6, 40, size=len(years))) + int(rng.integers(20, 80))
    ]
    color = pick(rng, COLORS)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(years, values, color=color, marker="o", linewidth=2)
        for i, value in enumerate(values):
            offset = (-4, 8)
            axes.annotate(
                str(value), (i, value), offset, textcoords="offset points", ha="right", fontsize=11
            )
        axes.set_title(title, fontsize=13)
        axes.set_ylabel(unit)
        axes.set_xlim(-0.6, len(years) - 0.7)
        axes.set_yticks(range(0, max(values) + 1, 50 if max(values) > 120 else 20))
        axes.set_ylim(0, max(values) * 1.18)
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)

    image, lines = render_figure(480, 340, paint)
    read = ocr(name(0), lines, "The numbers are written in the chart, so its text must be read.")
    a, b = sorted(int(i) for i in rng.permutation(len(years))[:2])
    growth = round((values[b] - values[a]) / values[a] * 100, 1)
    step = calculate(
        f"round(({values[b]} - {values[a]}) / {values[a]} * 100, 1)",
        growth,
        f"In {years[a]} there were {values[a]}, in {years[b]} {values[b]}; the growth in percent"
        " is asked.",
    )
    request = (
        f"By how many percent did the number of {unit} grow from {years[a]} to {years[b]},"
        " rounded to one digit?"
    )
    return Draft((image,), request, (read, step), step.returned)


def weather_table(rng: np.random.Generator, name: Name) -> Draft:
    """A table of temperatures: their mean, or a line chart of them."""
    towns = pick_some(rng, TOWNS, 3)
    start = int(rng.integers(0, 3))
    days = DAYS[start : start + 5]
    rows = {
        town: [int(t) for t in rng.integers(-3, 12, size=len(days)) + int(rng.integers(0, 16))]
        for town in towns
    }
    table = _draw_table(rng, days, rows)
    town = pick(rng, towns)
    temperatures = rows[town]
    read = ocr(
        name(0), table.lines, "The temperatures stand in the table, so its text must be read."
    )
    listed = ", ".join(map(str, temperatures))
    if rng.random() < 0.5:
        command = _plot_code("line", f"Temperature in {town}", list(days), temperatures)
        step = Step(
            "Plot", {"command": command},
            f"The temperatures of {town} are {listed}; a line chart of them is asked.",
            made_of(name(0)),
        )  # fmt: skip
        request = (
            f"Draw a line chart of the temperatures of {town} with the title Temperature in {town}."
        )
        return Draft((finish(table),), request, (read, step), "Here is the line chart.")
    added = " + ".join(f"({t})" if t < 0 else str(t) for t in temperatures)
    mean = round(sum(temperatures) / len(temperatures), 2)
    step = calculate(
        f"round(({added}) / {len(days)}, 2)", mean, f"The temperatures of {town} are {listed}."
    )
    request = f"What is the mean temperature of {town} in this table, rounded to two digits?"
    return Draft((finish(table),), request, (read, step), step.returned)


def equation(rng: np.random.Generator, name: Name) -> Draft:
    """A printed equation, or two of them: solve."""
    image, latex, code, result = _draw_equation(rng)
    steps = (
        Step(
            "MathOCR", {"image": name(0)}, "The image shows equations, which must be read.", latex
        ),
        Step(
            "Solver", {"command": code}, f"The equations are {latex}; now they are solved.", result
        ),
    )
    request = pick(
        rng,
        (
            "Solve what is written in this image.",
            "What are the solutions of the equations in the picture?",
        ),
    )
    return Draft((image,), request, steps, result)


def worksheet(rng: np.random.Generator, name: Name) -> Draft:
    """A printed expression: its value."""
    a, b, c, d = (int(v) for v in rng.integers(2, 20, size=4))
    latex, expression, value = pick(
        rng,
        (
            (rf"\frac{{{a}}}{{{b}}} + {c}^2", f"{a} / {b} + {c} ** 2", a / b + c**2),
            (rf"\sqrt{{{a}^2 + {b}^2}} \cdot {c}", f"sqrt({a} ** 2 + {b} ** 2) * {c}",
             float(np.hypot(a, b)) * c),
            (rf"\frac{{{a} + {b}}}{{{c} + {d}}}", f"({a} + {b}) / ({c} + {d})", (a + b) / (c + d)),
            (rf"{a} \cdot ({b} - {c}) + {d}^3", f"{a} * ({b} - {c}) + {d} ** 3",
             a * (b - c) + d**3),
        ),
    )  # fmt: skip
    steps = (
        Step(
            "MathOCR",
            {"image": name(0)},
            "The image shows a mathematical expression to read.",
            latex,
        ),
        calculate(
            f"round({expression}, 4)",
            round(value, 4),
            f"The expression is {latex}; its value is asked.",
        ),
    )
    image = _draw_formulas([latex + " ="], pick(rng, ("#fffef6", "#f3f7fb", "#22312c")))
    request = "What is the value of the expression on this worksheet, rounded to four digits?"
    return Draft((image,), request, steps, steps[1].returned)


def _plot_code(kind: str, title: str, labels: Sequence[str], values: Sequence[int]) -> str:
    draw = {
        "bars": f"    plt.pie(values, labels=labels, autopct='%1.1f%%')\n    plt.title({title!r})",
        "line": f"    plt.plot(labels, values, marker='o')\n    plt.title({title!r})",
    }[kind]
    return (
        "```python\nimport matplotlib.pyplot as plt\ndef solution():\n"
        f"    labels = {list(labels)!r}\n    values = {list(values)!r}\n"
        f"    figure = plt.figure(figsize=(8, 6))\n{draw}\n    return figure\n```"
    )


def _draw_equation(rng: np.random.Generator) -> tuple[bytes, str, str, str]:
    """(image, LaTeX, Solver's code, Solver's return) of equations with whole solutions."""
    paper = pick(rng, ("#fffef6", "#f3f7fb", "#22312c"))
    if rng.random() < 0.5:  # one quadratic equation with two roots
        p, q = sorted(int(v) for v in rng.choice(np.arange(-9, 10), size=2, replace=False))
        left = "x^2" + _term(-(p + q), "x") + _term(p * q, "")
        latex = f"{left} = 0"
        code = _solver_code(["x"], [(left, "0")])
        return _draw_formulas([latex], paper), latex, code, f"[{{x: {p}}}, {{x: {q}}}]"
    x, y = (int(v) for v in rng.integers(-6, 10, size=2))
    a, b = (int(v) for v in rng.integers(1, 6, size=2))
    c, d = a + int(rng.integers(1, 4)), -b  # a * d != b * c
    rows = [(_term(a, "x", first=True) + _term(b, "y"), str(a * x + b * y)),
            (_term(c, "x", first=True) + _term(d, "y"), str(c * x + d * y))]  # fmt: skip
    formulas = [f"{left} = {right}" for left, right in rows]
    code = _solver_code(["x", "y"], rows)
    return _draw_formulas(formulas, paper), r" \\ ".join(formulas), code, f"[{{x: {x}, y: {y}}}]"


def _term(factor: int, letter: str, *, first: bool = False) -> str:
    """`+ 3x`, `- x`, `+ 7`; nothing for 0."""
    if factor == 0:
        return ""
    size = "" if abs(factor) == 1 and letter else str(abs(factor))
    if first:
        return f"{'-' if factor < 0 else ''}{size}{letter}"
    return f" {'-' if factor < 0 else '+'} {size}{letter}"


def _solver_code(letters: list[str], equations: Sequence[tuple[str, str]]) -> str:
    def python(side: str) -> str:
        for letter in letters:  # 3x -> 3*x
            for digit in "0123456789":
                side = side.replace(f"{digit}{letter}", f"{digit}*{letter}")
        return side.replace("^", "**")

    written = [f"Eq({python(left)}, {python(right)})" for left, right in equations]
    names = ", ".join(letters)
    symbols = f"{names} = symbols('{' '.join(letters)}')"
    return (
        "```python\nfrom sympy import symbols, Eq, solve\ndef solution():\n"
        f"    {symbols}\n    equations = [{', '.join(written)}]\n"
        f"    return str(solve(equations, [{names}], dict=True))\n```"
    )


def _draw_formulas(formulas: list[str], paper: str) -> bytes:
    """Formulas below each other, as a textbook prints them."""
    ink = "#f4f1de" if paper == "#22312c" else "#1b1b1b"

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        figure.set_facecolor(paper)
        for row, formula in enumerate(formulas):
            y = 1 - (row + 0.5) / len(formulas)
            figure.text(0.5, y, f"${formula}$", ha="center", va="center", fontsize=30, color=ink,
                        math_fontfamily="cm")  # fmt: skip

    return render_figure(420, 110 + 70 * (len(formulas) - 1), paint)[0]


def _draw_table(
    rng: np.random.Generator, days: Sequence[str], rows: dict[str, list[int]]
) -> Canvas:
    head = pick(rng, ("#1f5f8b", "#3d6b35", "#7a4b8a", "#9c4a1a"))
    canvas = make_canvas(110 + 68 * len(days), 118 + 46 * len(rows), "#f6f8fa")
    write(canvas, (20, 34), "Weather: temperature in °C", 17, font="bold", anchor="lm")
    rectangle(canvas, (14, 58, canvas.image.width / 2 - 14, 98), head)
    for column, day in enumerate(days):
        write(canvas, (142 + 66 * column, 78), day, 15, font="bold", color="white", anchor="mm")
    for row, (town, values) in enumerate(rows.items()):
        y = 98 + 46 * row
        rectangle(
            canvas, (14, y, canvas.image.width / 2 - 14, y + 46), "white" if row % 2 else "#e4ebf1"
        )
        write(canvas, (28, y + 23), town, 15, font="bold", anchor="lm")
        for column, value in enumerate(values):
            ink = "#1646a0" if value < 3 else "#b5390f" if value > 17 else "#222222"
            write(canvas, (142 + 66 * column, y + 23), str(value), 16, color=ink, anchor="mm")
    line(canvas, ((14, 98), (14, 98 + 46 * len(rows))), head, width=1)
    return canvas
