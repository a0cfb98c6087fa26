"""Where the toy world's scenes are: sky, distance and ground, by place, time of day and weather."""

from __future__ import annotations

import random

from fluxfast.demo.toy_canvas import Canvas, Colour, darker, lighter, mix

# sky at its top and at the horizon
_SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((96, 178, 236), (206, 236, 250)),
    "sunset": ((116, 84, 150), (255, 176, 112)),
    "night": ((18, 24, 62), (58, 70, 128)),
}
# what the light makes of a colour: mixed with the second by its share
_LIGHT: dict[str, tuple[Colour, float]] = {
    "day": ((255, 255, 255), 0.0),
    "sunset": ((236, 110, 84), 0.22),
    "night": ((24, 30, 84), 0.5),
}
_GROUND: dict[str, Colour] = {
    "meadow": (132, 196, 96),
    "beach": (244, 220, 164),
    "desert": (232, 172, 98),
    "snow": (238, 244, 252),
    "city": (146, 148, 160),
    "forest": (94, 138, 84),
}
PLACES = tuple(_GROUND)
TIMES = tuple(_SKIES)
WEATHERS = ("clear", "cloudy", "rainy")
_HORIZON = 0.62


def lit(colour: Colour, time: str, share: float = 1.0) -> Colour:
    """A colour in the light of a time of day; `share` is how much of that light falls on it."""
    light, amount = _LIGHT[time]
    return mix(colour, light, amount * share)


def draw_place(canvas: Canvas, place: str, time: str, weather: str, draws: random.Random) -> None:
    """Fill the canvas; what varies between scenes of a kind comes from `draws`."""
    top, bottom = _SKIES[time]
    if weather != "clear":
        grey = (
            (150, 158, 172)
            if time == "day"
            else (104, 96, 116)
            if time == "sunset"
            else (40, 44, 66)
        )
        top, bottom = mix(top, grey, 0.7), mix(bottom, lighter(grey, 0.25), 0.6)
    canvas.replace()
    canvas.sky(top, bottom, _HORIZON)
    _lights_of_the_sky(canvas, time, weather, draws)
    if weather != "clear":
        _clouds(canvas, time, weather, draws)
    _DISTANCE[place](canvas, time, draws)
    ground = lit(_GROUND[place], time)
    edge = [(x / 6, _HORIZON + draws.uniform(-0.012, 0.012)) for x in range(-1, 8)]
    if place == "city":
        edge = [(x, _HORIZON + 0.02) for x, _ in edge]
    canvas.shape([*edge, (1.3, 1.3), (-0.3, 1.3)], ground, curved=False, shade=0.14, angle=0)
    _DETAILS[place](canvas, time, draws)


def draw_weather(canvas: Canvas, weather: str, draws: random.Random) -> None:
    """What falls in front of everything."""
    if weather != "rainy":
        return
    canvas.replace()
    for _ in range(46):
        x, y, long = draws.uniform(-0.05, 1.05), draws.uniform(-0.05, 1), draws.uniform(0.03, 0.06)
        canvas.line([(x, y), (x - long * 0.35, y + long)], 0.005, (206, 222, 244))


def _lights_of_the_sky(canvas: Canvas, time: str, weather: str, draws: random.Random) -> None:
    if time == "night":
        for _ in range(26 if weather == "clear" else 5):
            x, y, size = draws.random(), draws.uniform(0, 0.5), draws.choice((0.008, 0.011, 0.015))
            canvas.oval(x, y, size, size, (255, 250, 220), shade=0.0)
    if weather != "clear":
        return
    x = draws.choice((draws.uniform(0.08, 0.26), draws.uniform(0.74, 0.92)))
    if time == "day":
        canvas.oval(x, 0.15, 0.26, 0.26, (255, 246, 200), shade=0.0, blur=0.03, opacity=0.6)
        canvas.oval(x, 0.15, 0.13, 0.13, (255, 222, 92), shade=0.06)
    elif time == "sunset":
        canvas.oval(x, 0.5, 0.42, 0.42, (255, 214, 140), shade=0.0, blur=0.04, opacity=0.6)
        canvas.oval(x, 0.5, 0.2, 0.2, (255, 128, 88), shade=0.08)
    else:
        canvas.oval(x, 0.15, 0.2, 0.2, (190, 200, 240), shade=0.0, blur=0.03, opacity=0.4)
        canvas.oval(x, 0.15, 0.12, 0.12, (250, 244, 214), shade=0.04)
        canvas.oval(x + 0.03, 0.135, 0.1, 0.1, (28, 34, 76), shade=0.0)


def _clouds(canvas: Canvas, time: str, weather: str, draws: random.Random) -> None:
    colour = lit((250, 250, 252) if weather == "cloudy" else (170, 176, 190), time, 0.8)
    for _ in range(4):
        x, y, size = draws.uniform(0, 1), draws.uniform(0.04, 0.3), draws.uniform(0.7, 1.2)
        for dx, dy, wide in ((-0.1, 0.02, 0.16), (0.0, -0.02, 0.2), (0.1, 0.02, 0.17)):
            canvas.oval(
                x + dx * size, y + dy * size, wide * size, wide * 0.62 * size, colour, shade=0.08
            )


def _hills(canvas: Canvas, colour: Colour, high: float, draws: random.Random) -> None:
    tops = [(x / 5, _HORIZON - high * draws.uniform(0.3, 1.0)) for x in range(-1, 7)]
    canvas.shape([*tops, (1.4, 1.0), (-0.4, 1.0)], colour, shade=0.1)


def _meadow(canvas: Canvas, time: str, draws: random.Random) -> None:
    _hills(canvas, lit((152, 196, 150), time), 0.16, draws)
    _hills(canvas, lit((112, 176, 104), time), 0.09, draws)


def _beach(canvas: Canvas, time: str, draws: random.Random) -> None:
    sea = lit((62, 150, 196), time)
    canvas.shape([(-0.1, 0.47), (1.1, 0.47), (1.1, 0.8), (-0.1, 0.8)], sea, curved=False, angle=0)
    for _ in range(9):
        x, y, long = draws.uniform(0, 1), draws.uniform(0.49, 0.59), draws.uniform(0.05, 0.12)
        canvas.line([(x, y), (x + long, y)], 0.006, lighter(sea, 0.45))


def _desert(canvas: Canvas, time: str, draws: random.Random) -> None:
    _hills(canvas, lit((240, 196, 132), time), 0.13, draws)
    _hills(canvas, lit((222, 158, 88), time), 0.07, draws)


def _snow(canvas: Canvas, time: str, draws: random.Random) -> None:
    shift = draws.uniform(-0.1, 0.1)
    for x, high, wide in ((0.15, 0.34, 0.34), (0.82, 0.4, 0.38), (0.5, 0.26, 0.3)):
        x += shift
        rock = lit((128, 142, 172), time)
        sides = [(x - wide, _HORIZON + 0.05), (x, _HORIZON - high), (x + wide, _HORIZON + 0.05)]
        canvas.shape(sides, rock, curved=False, shade=0.12, angle=60)
        low, cut = _HORIZON - high * 0.6, wide * 0.36
        cap = [(x - cut, low), (x, _HORIZON - high), (x + cut, low), (x + cut / 2, low - 0.02)]
        cap += [(x, low + 0.03), (x - cut / 2, low - 0.01)]
        canvas.shape(cap, lit((250, 252, 255), time, 0.7), curved=False, shade=0.05)


def _city(canvas: Canvas, time: str, draws: random.Random) -> None:
    x = -0.05
    while x < 1.05:
        wide, high = draws.uniform(0.1, 0.17), draws.uniform(0.2, 0.44)
        colour = lit(draws.choice(((158, 150, 168), (134, 146, 168), (170, 156, 152))), time)
        top = _HORIZON - high
        walls = [(x, _HORIZON + 0.04), (x, top), (x + wide, top), (x + wide, _HORIZON + 0.04)]
        canvas.shape(walls, colour, curved=False, shade=0.1, angle=0)
        light = (255, 224, 140) if time == "night" else lighter(colour, 0.35)
        for row in range(int(high / 0.06)):
            for column in range(int(wide / 0.04)):
                if draws.random() < 0.75:
                    left, up = x + 0.012 + column * 0.04, top + 0.02 + row * 0.06
                    pane = [
                        (left, up),
                        (left + 0.02, up),
                        (left + 0.02, up + 0.03),
                        (left, up + 0.03),
                    ]
                    canvas.shape(pane, light, curved=False, shade=0.0)
        x += wide + 0.01


def _forest(canvas: Canvas, time: str, draws: random.Random) -> None:
    for row, (count, high) in enumerate(((9, 0.42), (7, 0.34))):
        colour = lit(((112, 150, 122), (70, 116, 88))[row], time)
        for index in range(count):
            x, tall = (index + draws.uniform(0.2, 0.8)) / count, high * draws.uniform(0.8, 1.15)
            foot = _HORIZON + 0.02
            for layer in range(3):
                wide, low = 0.085 - 0.018 * layer, foot - tall * 0.28 * layer
                tree = [(x - wide, low), (x, low - tall * 0.48), (x + wide, low)]
                canvas.shape(tree, colour, curved=False, shade=0.12, angle=60)


_DISTANCE = {
    "meadow": _meadow, "beach": _beach, "desert": _desert, "snow": _snow, "city": _city,
    "forest": _forest,
}  # fmt: skip


def _flowers(canvas: Canvas, time: str, draws: random.Random) -> None:
    for _ in range(16):
        x, y = draws.random(), draws.uniform(0.68, 0.98)
        canvas.line([(x, y), (x + 0.006, y - 0.025)], 0.006, lit((84, 150, 72), time))
        colour = draws.choice(((255, 250, 236), (255, 236, 150)))
        canvas.oval(x + 0.006, y - 0.03, 0.018, 0.018, lit(colour, time, 0.6), shade=0.0)


def _shells(canvas: Canvas, time: str, draws: random.Random) -> None:
    foam = [(x / 6, _HORIZON + draws.uniform(-0.004, 0.012)) for x in range(-1, 8)]
    canvas.line(foam, 0.016, lit((255, 252, 244), time, 0.7))
    for _ in range(7):
        canvas.oval(
            draws.random(), draws.uniform(0.7, 0.97), 0.022, 0.015, lit((250, 238, 214), time)
        )


def _cacti(canvas: Canvas, time: str, draws: random.Random) -> None:
    colour = lit((96, 140, 92), time)
    for x in (draws.uniform(0.04, 0.16), draws.uniform(0.84, 0.96)):
        foot, size = draws.uniform(0.66, 0.72), draws.uniform(0.8, 1.2)
        canvas.line([(x, foot), (x, foot - 0.15 * size)], 0.03, colour)
        for side in (-1, 1):
            arm = x + side * 0.04 * size
            canvas.line(
                [(x, foot - 0.06), (arm, foot - 0.07), (arm, foot - 0.11 * size)], 0.018, colour
            )


def _drifts(canvas: Canvas, time: str, draws: random.Random) -> None:
    for _ in range(5):
        x, y, wide = draws.random(), draws.uniform(0.68, 0.96), draws.uniform(0.15, 0.3)
        canvas.oval(x, y, wide, 0.028, lit((206, 222, 242), time), shade=0.0)


def _street(canvas: Canvas, time: str, draws: random.Random) -> None:
    road = lit((84, 86, 100), time)
    canvas.shape([(-0.1, 0.74), (1.1, 0.74), (1.1, 1.1), (-0.1, 1.1)], road, curved=False, angle=0)
    start = draws.uniform(-0.2, 0.0)
    for index in range(6):
        left = start + index * 0.24
        canvas.line([(left, 0.93), (left + 0.11, 0.93)], 0.014, lit((236, 232, 214), time, 0.6))


def _undergrowth(canvas: Canvas, time: str, draws: random.Random) -> None:
    colour = lit((70, 112, 66), time)
    for _ in range(14):
        x, y = draws.random(), draws.uniform(0.66, 0.98)
        for lean in (-0.018, 0.0, 0.018):
            canvas.line([(x, y), (x + lean, y - 0.035)], 0.007, darker(colour, 0.1))


_DETAILS = {
    "meadow": _flowers, "beach": _shells, "desert": _cacti, "snow": _drifts, "city": _street,
    "forest": _undergrowth,
}  # fmt: skip
