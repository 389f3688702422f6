"""Families whose images are printed matter: menus, receipts, labels, tickets, signs, books.

Next: data_pipelines/gta_policy/families/charts.py
"""

from __future__ import annotations

import numpy as np

from data_pipelines.gta_policy.drawing import (
    Canvas,
    ellipse,
    finish,
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
    calculate,
    count,
    describe,
    number_text,
    ocr,
    pick,
    pick_some,
    search,
)

PLACES = (
    "The Copper Kettle", "Blue Heron", "Casa Luna", "Old Mill Inn", "Sunny Side", "Harbour Table",
    "Green Lantern", "Nonna Rosa", "The Pear Tree", "Riverside Grill",
)  # fmt: skip
# menu name, what it is called on the table (one, many)
SERVED = (
    ("Beer", "glass of beer", "glasses of beer"),
    ("Coffee", "cup of coffee", "cups of coffee"),
    ("Orange juice", "glass of orange juice", "glasses of orange juice"),
    ("Pizza slice", "slice of pizza", "slices of pizza"),
    ("Tomato soup", "bowl of tomato soup", "bowls of tomato soup"),
)
OTHER_DISHES = ("Green salad", "Cheese toast", "Lemonade", "Apple pie", "Grilled fish", "Ice cream")
GOODS = (
    ("Milk 1 l", 1.2), ("Bread", 2.4), ("Eggs x10", 3.1), ("Apples 1 kg", 2.8), ("Rice 1 kg", 1.9),
    ("Coffee 500 g", 6.5), ("Butter", 2.3), ("Tomatoes", 2.6), ("Pasta", 1.4), ("Cheese", 4.7),
    ("Olive oil", 7.9), ("Honey", 5.2), ("Tea", 3.3), ("Soap", 1.8), ("Oranges", 3.4),
)  # fmt: skip
SHOPS = ("CITY MARKET", "FRESH & CO", "CORNER SHOP", "DAILY FOODS", "MARKET HALL", "VILLAGE STORE")
PILLS = ("FISH OIL", "VITAMIN C", "CALCIUM", "ZINC", "MAGNESIUM", "VITAMIN D3", "IRON", "BIOTIN")
# city, country, currency
TRIPS = (
    ("Tokyo", "Japan", "Japanese yen"), ("Zurich", "Switzerland", "Swiss franc"),
    ("Prague", "the Czech Republic", "Czech koruna"), ("Warsaw", "Poland", "Polish zloty"),
    ("Budapest", "Hungary", "Hungarian forint"), ("Oslo", "Norway", "Norwegian krone"),
    ("Bangkok", "Thailand", "Thai baht"), ("Delhi", "India", "Indian rupee"),
    ("Stockholm", "Sweden", "Swedish krona"), ("Hanoi", "Vietnam", "Vietnamese dong"),
)  # fmt: skip
ORIGINS = ("Paris", "Berlin", "Vienna", "Milan", "Madrid", "Brussels", "Munich", "Lisbon")
CAR_COLORS = {
    "red": "#c0262d",
    "blue": "#2456b8",
    "white": "#f4f4f2",
    "yellow": "#f2c21a",
    "black": "#23242a",
}
# title, author, year of the first publication
BOOKS = (
    ("Pride and Prejudice", "Jane Austen", 1813), ("Moby-Dick", "Herman Melville", 1851),
    ("Frankenstein", "Mary Shelley", 1818), ("Dracula", "Bram Stoker", 1897),
    ("Jane Eyre", "Charlotte Brontë", 1847), ("Walden", "Henry David Thoreau", 1854),
    ("Treasure Island", "Robert Louis Stevenson", 1883), ("Emma", "Jane Austen", 1815),
    ("The Time Machine", "H. G. Wells", 1895), ("Wuthering Heights", "Emily Brontë", 1847),
    ("The Jungle Book", "Rudyard Kipling", 1894), ("Middlemarch", "George Eliot", 1871),
)  # fmt: skip
PRODUCTS = (
    "Oat flakes",
    "Peanut butter",
    "Basmati rice",
    "Muesli",
    "Raisins",
    "Lentils",
    "Cashews",
)
MAKERS = ("Alba", "Nordic", "Farmer's", "Primo", "Golden", "Valley", "Terra")


def menu(rng: np.random.Generator, name: Name) -> Draft:
    """A menu and a table: what do the beers cost?"""
    asked, other = pick_some(rng, SERVED, 2)
    amounts = {asked[0]: int(rng.integers(2, 6)), other[0]: int(rng.integers(1, 4))}
    dishes = [kind[0] for kind in SERVED] + pick_some(rng, OTHER_DISHES, 3)
    prices = {dish: int(rng.integers(4, 30)) / 2 for dish in dishes}
    place = pick(rng, PLACES)
    card, table = _draw_menu(rng, place, prices), _draw_table(rng, amounts)
    total = prices[asked[0]] * amounts[asked[0]]
    things = asked[2]
    price = number_text(prices[asked[0]])
    seen = " and ".join(
        f"{amounts[kind[0]]} {kind[1] if amounts[kind[0]] == 1 else kind[2]}"
        for kind in (asked, other)
    )
    return Draft(
        (finish(card), finish(table)),
        pick(
            rng,
            (
                f"How much should I pay for the {things} on the table according to the menu?",
                f"I ordered all the {things} on the table. What do they cost by this menu?",
            ),
        ),
        (
            describe(name(0), f"The menu of the restaurant {place} with {len(prices)} dishes and"
                     " drinks and their prices."),
            describe(name(1), f"A wooden table seen from above with {seen}."),
            ocr(name(0), card.lines, "The prices stand on the menu, so its text must be read."),
            count(name(1), asked[1], amounts[asked[0]],
                  f"One {asked[1]} costs {price}; now the {things} on the table must be counted."),
            calculate(f"{price} * {amounts[asked[0]]}", total,
                      f"There are {amounts[asked[0]]} {things} at {price} each."),
        ),
        number_text(total),
    )  # fmt: skip


def receipt(rng: np.random.Generator, name: Name) -> Draft:
    """A receipt that is split, or that gets a tip, or is written on."""
    people = int(rng.integers(2, 7))
    bought = [
        (text, int(rng.integers(1, 4)), price)
        for text, price in pick_some(rng, GOODS, int(rng.integers(4, 8)))
    ]
    total = round(sum(amount * price for _, amount, price in bought), 2)
    paper = _draw_receipt(rng, bought, total)
    read = ocr(name(0), paper.lines, "The total stands on the receipt, so its text must be read.")
    said = f"{total:.2f}"
    if rng.random() < 0.4:
        percent = int(pick(rng, (5, 10, 12, 15, 20)))
        expression = f"{said} * {percent} / 100"
        value = total * percent / 100
        request = f"How much is a tip of {percent} percent of the total on this receipt?"
        why = f"The total is {said}; {percent} percent of it are asked."
        return Draft(
            (finish(paper),), request, (read, calculate(expression, value, why)), number_text(value)
        )
    share = total / people
    steps = [
        read,
        calculate(f"round({said} / {people}, 2)", round(share, 2),
                  f"The total is {said} and {people} people share it, rounded to cents."),
    ]  # fmt: skip
    request = (
        f"The {people} of us share this bill equally. How much does each one pay, rounded to cents?"
    )
    if rng.random() < 0.5:
        where, ink = pick(rng, tuple(POSITIONS)), pick(rng, INKS)
        text = number_text(round(share, 2))
        request += f" Write the number in {ink} at the {where} of the image."
        why = f"Each pays {text}; it is to be written in {ink} at the {where}."
        steps.append(add_text(name(0), text, where, ink, why))
    return Draft((finish(paper),), request, tuple(steps), number_text(round(share, 2)))


def supplement(rng: np.random.Generator, name: Name) -> Draft:
    """A bottle's label: how many days does it last?"""
    product, people, daily = pick(rng, PILLS), int(rng.integers(2, 6)), int(rng.integers(1, 4))
    days = int(rng.integers(8, 31))
    pieces = people * daily * days
    label = _draw_label(rng, product, pieces, daily)
    expression = f"{pieces} / ({people} * {daily})"
    return Draft(
        (finish(label),),
        f"We are {people} people and all of us take this as the label says."
        " For how many days is one bottle enough?",
        (
            ocr(name(0), label.lines, "The number of pieces and the dose stand on the label."),
            calculate(expression, days,
                      f"There are {pieces} pieces, {people} people take {daily} a day each."),
        ),
        str(days),
    )  # fmt: skip


def ticket(rng: np.random.Generator, name: Name) -> Draft:
    """A flight ticket: its price for several, or the currency of the country it leads to."""
    city, country, currency = pick(rng, TRIPS)
    price = int(rng.integers(40, 400)) / 2
    paper = _draw_ticket(rng, pick(rng, ORIGINS), city, price)
    if rng.random() < 0.5:
        travellers = int(rng.integers(2, 8))
        steps = (
            ocr(name(0), paper.lines, "The price of one ticket is printed on it."),
            calculate(f"{number_text(price)} * {travellers}", price * travellers,
                      f"One ticket costs {number_text(price)} and {travellers} are needed."),
        )  # fmt: skip
        request = f"What do {travellers} tickets like this one cost together?"
        return Draft((finish(paper),), request, steps, number_text(price * travellers))
    results = (
        f"{currency} - The {currency} is the official currency of {country}.",
        f"Money in {city} - Prices in {city} are given in {currency}.",
        f"{country[0].upper()}{country[1:]} travel guide - Currency: {currency}.",
        f"Exchange rates - {currency} against the euro and the dollar.",
    )
    steps = (
        ocr(name(0), paper.lines, "Where the flight ends is printed on the ticket."),
        search(f"official currency used in {city}", results,
               f"The flight ends in {city}; its currency must be looked up.", open_ended=False),
    )  # fmt: skip
    request = "Which currency do I need in the city where this flight ends?"
    return Draft((finish(paper),), request, steps, currency)


def parking(rng: np.random.Generator, name: Name) -> Draft:
    """A price sign and a car park: what do the red cars pay?"""
    color, hours = pick(rng, ("red", "blue", "white", "yellow")), int(rng.integers(2, 6))
    price = int(rng.integers(2, 13)) / 2
    cars = [str(c) for c in rng.choice(list(CAR_COLORS), size=int(rng.integers(7, 12)))]
    cars[:2] = [color, color]
    cars = pick_some(rng, cars, len(cars))
    number = cars.count(color)
    sign, lot = _draw_parking_sign(rng, price), _draw_car_park(rng, cars)
    value = number * price * hours
    return Draft(
        (finish(sign), finish(lot)),
        f"Every {color} car in the car park stays for {hours} hours."
        " How much do they pay in all at the price on the sign?",
        (
            describe(name(0), "A parking sign with a white P and a price per hour."),
            describe(name(1), f"A car park from above with {len(cars)} cars of several colours."),
            ocr(name(0), sign.lines, "The price per hour stands on the sign."),
            count(name(1), f"{color} car", number, f"Now the {color} cars must be counted."),
            calculate(f"{number} * {number_text(price)} * {hours}", value,
                      f"{number} cars, {number_text(price)} an hour, {hours} hours each."),
        ),
        number_text(value),
    )  # fmt: skip


def price_tags(rng: np.random.Generator, name: Name) -> Draft:
    """Two price tags: how much cheaper is one for 100 g?"""
    product = pick(rng, PRODUCTS)
    makers = pick_some(rng, MAKERS, 2)
    grams = [int(g) for g in pick_some(rng, (250, 400, 500, 750, 800, 1000), 2)]
    prices = [round(g * float(rng.uniform(0.4, 1.6)) / 100, 2) for g in grams]
    tags = [_draw_price_tag(rng, product, *row) for row in zip(makers, grams, prices, strict=True)]
    expression = f"round(abs({prices[0]:.2f} / {grams[0]} - {prices[1]:.2f} / {grams[1]}) * 100, 3)"
    value = round(abs(prices[0] / grams[0] - prices[1] / grams[1]) * 100, 3)
    steps = [
        describe(name(i), f"A price tag of {makers[i]} {product.lower()}.") for i in range(2)
    ] + [
        ocr(name(i), tags[i].lines, f"Price and weight of {makers[i]} stand on {name(i)}.")
        for i in range(2)
    ]
    steps.append(
        calculate(expression, value,
                  f"{prices[0]:.2f} for {grams[0]} g and {prices[1]:.2f} for {grams[1]} g;"
                  " the difference for 100 g is asked.")
    )  # fmt: skip
    return Draft(
        tuple(map(finish, tags)),
        "How much do the prices of these two products differ for 100 g, rounded to three digits?",
        tuple(steps),
        number_text(value),
    )


def book(rng: np.random.Generator, name: Name) -> Draft:
    """A book cover: how long ago was it first published?"""
    title, author, year = pick(rng, BOOKS)
    until = int(rng.integers(1950, 2026))
    cover = _draw_book(rng, title, author)
    results = (
        f"{title} - a book by {author}, first published in {year}.",
        f"{author} - works: {title} ({year}).",
        f"{title} ({year}) - summary and analysis.",
        f"First editions of {title}, {year}.",
    )
    return Draft(
        (finish(cover),),
        f"How many years before {until} was this book first published?",
        (
            ocr(name(0), cover.lines, "Title and author stand on the cover."),
            search(f"first publication year of {title} by {author}", results,
                   f"The book is {title} by {author}; its year must be looked up.",
                   open_ended=False),
            calculate(f"{until} - {year}", until - year, f"It was first published in {year}."),
        ),
        str(until - year),
    )  # fmt: skip


def _draw_menu(rng: np.random.Generator, place: str, prices: dict[str, float]) -> Canvas:
    paper, ink = pick(rng, (("#fbf3e0", "#5a2d0c"), ("#f4f7f2", "#1f4d3a"), ("#232a34", "#f3e3b3")))
    height = 150 + 38 * len(prices)
    canvas = make_canvas(380, height, paper)
    rectangle(canvas, (10, 10, 370, height - 10), outline=ink, width=2)
    rectangle(canvas, (15, 15, 365, height - 15), outline=ink, width=1)
    write(canvas, (190, 55), place, 26, font="serif bold", color=ink, anchor="mm")
    write(canvas, (190, 92), "MENU", 15, font="serif", color=ink, anchor="mm")
    line(canvas, ((60, 112), (320, 112)), ink, width=1)
    for row, dish in enumerate(pick_some(rng, tuple(prices), len(prices))):
        y = 140 + 38 * row
        end = write(canvas, (40, y), dish, 17, font="serif", color=ink, anchor="lm")[2]
        start = write(
            canvas, (340, y), f"{prices[dish]:.2f}", 17, font="serif", color=ink, anchor="rm"
        )[0]
        for x in range(end + 8, start - 6, 7):
            ellipse(canvas, (x, y + 5, x + 1.6, y + 6.6), ink)
    return canvas


def _draw_table(rng: np.random.Generator, amounts: dict[str, int]) -> Canvas:
    """Dishes seen from above on a wooden table, each in a place of its own."""
    canvas = make_canvas(480, 360, "#b47a45")
    for y in range(0, 360, 45):
        shade = pick(rng, ("#b47a45", "#ac7340", "#bb824d", "#a86f3c"))
        rectangle(canvas, (0, y, 480, y + 45), shade)
        line(canvas, ((0, y), (480, y)), "#8d5a2f", width=1.2)
    places = [(80 + 107 * column, 75 + 105 * row) for row in range(3) for column in range(4)]
    dishes = [dish for dish, amount in amounts.items() for _ in range(amount)]
    for (x, y), dish in zip(pick_some(rng, places, len(dishes)), dishes, strict=True):
        x, y = x + float(rng.uniform(-12, 12)), y + float(rng.uniform(-10, 10))
        ellipse(canvas, (x - 36, y - 30, x + 42, y + 44), "#8f5e33")  # shadow
        _draw_dish(rng, canvas, dish, x, y)
    return canvas


def _draw_dish(rng: np.random.Generator, canvas: Canvas, dish: str, x: float, y: float) -> None:
    def disc(radius: float, color: str, dx: float = 0.0, dy: float = 0.0, **style) -> None:
        ellipse(
            canvas,
            (x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius),
            color,
            **style,
        )

    if dish == "Beer":
        rectangle(
            canvas, (x + 22, y - 9, x + 42, y + 9), None, outline="#dfe8ea", width=5, radius=6
        )
        disc(28, "#dfe8ea")
        disc(24, "#e8a317")
        for angle in range(0, 360, 45):
            dx, dy = 8 * np.cos(np.radians(angle)), 8 * np.sin(np.radians(angle))
            disc(7, "#fff8e7", float(dx), float(dy))
        disc(7, "#fffdf6")
    elif dish == "Coffee":
        disc(36, "#f7f7f5", outline="#d5d5d0", width=1)
        rectangle(
            canvas, (x + 18, y - 6, x + 36, y + 6), None, outline="#ffffff", width=4, radius=5
        )
        disc(23, "#ffffff", outline="#cfcfca", width=1)
        disc(19, "#4a2511")
        disc(8, "#8a5a35", -4, -4)
    elif dish == "Orange juice":
        disc(26, "#e3eef2", outline="#b9cdd6", width=1)
        disc(22, "#ff9a1f")
        disc(9, "#ffd27a", 7, -7)
        line(canvas, ((x - 4, y + 4), (x - 30, y - 28)), "#d23c6e", width=5)
    elif dish == "Pizza slice":
        disc(37, "#f4f4f1", outline="#d0d0cc", width=1)
        polygon(canvas, ((x - 24, y - 20), (x + 24, y - 20), (x, y + 30)), "#d99a4e")
        polygon(canvas, ((x - 18, y - 12), (x + 18, y - 12), (x, y + 26)), "#f6c945")
        for dx, dy in ((-8, -5), (8, -4), (0, 9)):
            disc(5.2, "#b8321f", dx, dy)
    else:
        disc(37, "#f4f4f1", outline="#d0d0cc", width=1)
        disc(29, "#ffffff", outline="#cfcfca", width=1)
        disc(25, "#cf3a1e")
        disc(7, "#f6e9d8", -5, 3)
        for dx, dy in ((6, -8), (10, 4), (-9, -7)):
            ellipse(canvas, (x + dx - 4, y + dy - 2, x + dx + 4, y + dy + 2), "#3d7a2a")


def _draw_receipt(
    rng: np.random.Generator, bought: list[tuple[str, int, float]], total: float
) -> Canvas:
    height = 190 + 26 * len(bought)
    canvas = make_canvas(320, height, "#cfc8bd")
    rectangle(canvas, (14, 10, 306, height - 10), "#fdfdfb")
    write(canvas, (160, 40), pick(rng, SHOPS), 18, font="bold", anchor="mm")
    day = f"{int(rng.integers(1, 29)):02d}.{int(rng.integers(1, 13)):02d}.2024"
    write(canvas, (160, 64), f"Date {day}", 12, font="mono", anchor="mm")
    for x in range(30, 290, 8):
        line(canvas, ((x, 84), (x + 4, 84)), "#777777", width=1)
    for row, (text, amount, price) in enumerate(bought):
        y = 104 + 26 * row
        write(canvas, (30, y), f"{amount} x {text}", 13, font="mono", anchor="lm")
        write(canvas, (290, y), f"{amount * price:.2f}", 13, font="mono", anchor="rm")
    y = 104 + 26 * len(bought)
    line(canvas, ((30, y), (290, y)), "#333333", width=1)
    write(canvas, (30, y + 24), "TOTAL", 17, font="bold", anchor="lm")
    write(canvas, (290, y + 24), f"{total:.2f}", 17, font="bold", anchor="rm")
    x = 60.0
    while x < 258:  # a bar code
        width = float(rng.integers(1, 5))
        rectangle(canvas, (x, y + 46, x + width, y + 66), "#1a1a1a")
        x += width + float(rng.integers(2, 5))
    return canvas


def _draw_label(rng: np.random.Generator, product: str, pieces: int, daily: int) -> Canvas:
    color, light = pick(
        rng, (("#b3261e", "#fff4e6"), ("#1d5f8a", "#eef7fb"), ("#2f6b3a", "#f1f8ee"))
    )
    canvas = make_canvas(340, 420, "#eceff1")
    rectangle(canvas, (90, 14, 250, 74), "#fafafa", outline="#b0b7bb", width=2, radius=8)
    for x in range(100, 246, 9):
        line(canvas, ((x, 20), (x, 68)), "#d5dadd", width=1)
    rectangle(canvas, (50, 66, 290, 408), color, radius=26)
    rectangle(canvas, (50, 130, 290, 350), light)
    write(canvas, (170, 102), "NATURE'S BEST", 15, font="bold", color="white", anchor="mm")
    write(canvas, (170, 170), product, 27, font="bold", color=color, anchor="mm")
    dose = pick(rng, (500, 1000, 1200, 250, 400))
    write(canvas, (170, 205), f"{dose} mg", 17, color="#333333", anchor="mm")
    write(canvas, (170, 252), f"{pieces} TABLETS", 23, font="bold", anchor="mm")
    write(canvas, (170, 300), f"Take {daily} tablet{'s' if daily > 1 else ''}", 16, anchor="mm")
    write(canvas, (170, 324), "per person and day", 16, anchor="mm")
    write(canvas, (170, 378), "Dietary supplement", 13, color="white", anchor="mm")
    return canvas


def _draw_ticket(rng: np.random.Generator, origin: str, city: str, price: float) -> Canvas:
    color = pick(rng, ("#0b6e99", "#a63d40", "#4c6b22", "#5b3f8c"))
    canvas = make_canvas(500, 230, "#d9dee2")
    rectangle(canvas, (16, 16, 484, 214), "#fffef8", radius=12)
    rectangle(canvas, (16, 16, 484, 62), color, radius=12)
    rectangle(canvas, (16, 48, 484, 62), color)
    write(canvas, (36, 39), "FLIGHT TICKET", 18, font="bold", color="white", anchor="lm")
    write(
        canvas, (464, 39), f"No. {int(rng.integers(10000, 99999))}", 14, color="white", anchor="rm"
    )
    rows = (
        ("From", origin), ("To", city),
        ("Date", f"{int(rng.integers(1, 29)):02d}.{int(rng.integers(1, 13)):02d}.2025"),
        ("Seat", f"{int(rng.integers(1, 60))}{pick(rng, 'ABCD')}"),
    )  # fmt: skip
    for row, (label, value) in enumerate(rows):
        y = 86 + 32 * row
        write(canvas, (36, y), label, 13, color="#777777", anchor="lm")
        write(canvas, (100, y), value, 18, font="bold", anchor="lm")
    for y in range(70, 208, 9):
        line(canvas, ((345, y), (345, y + 5)), "#999999", width=1.5)
    write(canvas, (415, 100), "Price", 13, color="#777777", anchor="mm")
    write(canvas, (415, 132), f"{price:.2f} EUR", 17, font="bold", color=color, anchor="mm")
    write(canvas, (415, 170), "1 adult", 13, anchor="mm")
    return canvas


def _draw_parking_sign(rng: np.random.Generator, price: float) -> Canvas:
    sky = pick(rng, ("#cfe5f2", "#e9eef0", "#f3e6d0"))
    canvas = make_canvas(300, 380, sky)
    rectangle(canvas, (141, 300, 159, 380), "#8b9196")
    rectangle(canvas, (45, 25, 255, 310), "#1555a5", outline="white", width=6, radius=16)
    write(canvas, (150, 110), "P", 110, font="bold", color="white", anchor="mm")
    write(canvas, (150, 205), f"{price:.2f} EUR", 27, font="bold", color="white", anchor="mm")
    write(canvas, (150, 238), "per hour", 19, color="white", anchor="mm")
    write(
        canvas,
        (150, 278),
        pick(rng, ("Mon - Sun", "0 - 24 h", "8 - 20 h")),
        17,
        color="white",
        anchor="mm",
    )
    return canvas


def _draw_car_park(rng: np.random.Generator, cars: list[str]) -> Canvas:
    canvas = make_canvas(480, 330, "#6c7075")
    bays = [(20 + 74 * column, y) for y in (16, 198) for column in range(6)]
    for x, y in bays:
        for edge in (x, x + 74):
            line(canvas, ((edge, y), (edge, y + 116)), "#e8e8e3", width=2.5)
    for x in range(20, 460, 44):
        line(canvas, ((x, 165), (x + 22, 165)), "#e8e8e3", width=2)
    chosen = sorted(pick_some(rng, bays, len(cars)))
    for (x, y), color in zip(chosen, cars, strict=True):
        x, y = x + 16 + float(rng.uniform(-4, 4)), y + 10 + float(rng.uniform(-4, 4))
        paint = CAR_COLORS[color]
        glass = "#9fb7c6" if color == "black" else "#2f3d47"
        rectangle(canvas, (x + 3, y + 4, x + 46, y + 98), "#56595d", radius=13)
        for wx, wy in ((x - 2, y + 16), (x + 39, y + 16), (x - 2, y + 66), (x + 39, y + 66)):
            rectangle(canvas, (wx, wy, wx + 5, wy + 15), "#1b1b1d", radius=2)
        rectangle(canvas, (x, y, x + 42, y + 94), paint, outline="#3b3d40", width=1, radius=13)
        polygon(
            canvas, ((x + 5, y + 34), (x + 37, y + 34), (x + 33, y + 46), (x + 9, y + 46)), glass
        )
        polygon(
            canvas, ((x + 8, y + 72), (x + 34, y + 72), (x + 37, y + 82), (x + 5, y + 82)), glass
        )
        for lx in (x + 4, x + 30):
            ellipse(canvas, (lx, y + 3, lx + 8, y + 8), "#fff6c9")
    return canvas


def _draw_price_tag(
    rng: np.random.Generator, product: str, maker: str, grams: int, price: float
) -> Canvas:
    band = pick(rng, ("#ffd400", "#ff8a3d", "#8fd14f", "#7cc7ff"))
    canvas = make_canvas(360, 210, "#7a6a58")
    rectangle(canvas, (14, 14, 346, 196), "white", radius=6)
    rectangle(canvas, (14, 14, 346, 62), band, radius=6)
    rectangle(canvas, (14, 50, 346, 62), band)
    write(canvas, (30, 38), f"{maker} {product}", 19, font="bold", anchor="lm")
    write(canvas, (30, 92), f"{grams} g", 19, anchor="lm")
    write(canvas, (326, 132), f"{price:.2f}", 46, font="bold", color="#c01818", anchor="rm")
    write(canvas, (326, 176), "EUR", 15, anchor="rm")
    x = 30.0
    while x < 140:
        width = float(rng.integers(1, 4))
        rectangle(canvas, (x, 140, x + width, 180), "#1a1a1a")
        x += width + float(rng.integers(2, 4))
    return canvas


def _draw_book(rng: np.random.Generator, title: str, author: str) -> Canvas:
    cover, ink = pick(
        rng,
        (
            ("#1d3557", "#f1d9a0"),
            ("#6b1f2a", "#f6e7cf"),
            ("#264d3b", "#efe3b6"),
            ("#ece2cf", "#3b2a20"),
        ),
    )
    canvas = make_canvas(320, 450, "#b9b2a8")
    rectangle(canvas, (28, 22, 300, 436), "#8c857b", radius=4)
    rectangle(canvas, (20, 14, 292, 428), cover, radius=4)
    line(canvas, ((36, 14), (36, 428)), ink, width=1)
    rectangle(canvas, (50, 34, 278, 408), outline=ink, width=1.5)
    words, rows = title.split(), [""]
    for word in words:  # break the title into lines of at most 12 letters
        longer = f"{rows[-1]} {word}".strip()
        rows = [*rows[:-1], longer] if len(longer) <= 12 or not rows[-1] else [*rows, word]
    for row, text in enumerate(rows):
        write(canvas, (164, 92 + 36 * row), text, 25, font="serif bold", color=ink, anchor="mm")
    center, style = 270, int(rng.integers(3))
    for ring in range(5):
        reach = 54 - 10 * ring
        box = (164 - reach, center - reach, 164 + reach, center + reach)
        if style == 0:
            ellipse(canvas, box, outline=ink, width=1.5)
        elif style == 1:
            rectangle(canvas, box, outline=ink, width=1.5)
        else:
            polygon(
                canvas,
                ((164, box[1]), (box[2], center), (164, box[3]), (box[0], center)),
                cover if ring % 2 else ink,
            )
    write(canvas, (164, 376), author, 15, font="italic", color=ink, anchor="mm")
    return canvas
