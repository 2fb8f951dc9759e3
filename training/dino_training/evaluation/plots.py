"""Bar charts of figures with their intervals, and line charts, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn in twice the pixels, for sharp screens
_LINE, _MARGIN, _TITLE = 26 * _SCALE, 16 * _SCALE, 40 * _SCALE
_AXIS = 30 * _SCALE
_PLOT_WIDTH = 420 * _SCALE
_INK, _GREY, _GRID, _BAR, _PAPER = "#1b1f24", "#667080", "#dde2e8", "#5b8def", "#ffffff"
_TICKS = (0, 20, 40, 60, 80, 100)
_LINES_HEIGHT = 250 * _SCALE
# Okabe and Ito's palette: eyes that cannot tell red from green tell these apart.
_SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#1b1f24")
_NUM_STEPS = 5  # between ticks, about
_DASH = 6 * _SCALE

Points = Sequence[tuple[float, float]]
"""(x, y) in rising order of x."""


@dataclass(frozen=True)
class Bar:
    """value, interval: 0..1."""

    name: str
    value: float
    interval: tuple[float, float]


def draw_bars(title: str, bars: Sequence[Bar]) -> Image.Image:
    """A bar a line from 0 to 100 %, its name to the left, its value to the right, its interval as a whisker."""
    font, heading = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(15 * _SCALE)
    values = [f"{100 * bar.value:.1f} %" for bar in bars]
    left = _MARGIN + max((font.getlength(bar.name) for bar in bars), default=0) + _MARGIN
    right = left + _PLOT_WIDTH
    width = max(right + max(map(font.getlength, values), default=0), heading.getlength(title)) + 2 * _MARGIN
    bottom = _TITLE + _LINE * len(bars)
    sheet = Image.new("RGB", (round(width), bottom + _AXIS), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _TITLE / 2), title, _INK, heading, anchor="lm")

    def across(value: float) -> float:
        return left + _PLOT_WIDTH * value

    for tick in _TICKS:
        x = across(tick / 100)
        draw.line([(x, _TITLE), (x, bottom)], _GRID, _SCALE)
        draw.text((x, bottom + _AXIS / 2), f"{tick} %", _GREY, font, anchor="mm")
    for number, (bar, value) in enumerate(zip(bars, values, strict=True)):
        middle = _TITLE + _LINE * (number + 0.5)
        half = _LINE * 0.3
        draw.rectangle([left, middle - half, across(bar.value), middle + half], _BAR)
        low, high = (across(end) for end in bar.interval)
        draw.line([(low, middle), (high, middle)], _INK, _SCALE)
        for end in (low, high):
            draw.line([(end, middle - half / 2), (end, middle + half / 2)], _INK, _SCALE)
        draw.text((left - _MARGIN / 2, middle), bar.name, _INK, font, anchor="rm")
        draw.text((right + _MARGIN / 2, middle), value, _INK, font, anchor="lm")
    return sheet


def draw_lines(
    title: str,
    x_label: str,
    series: Mapping[str, Points],
    *,
    y_range: tuple[float, float] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Image.Image:
    """A line chart with a legend: a line for each series, such as {"DINO": [(0, 5.1), (10, 4.7)]}.

    title: also says what y is. x_label: under the axis. series: name to points; a point that is not finite breaks the
    line there, and a series may be empty. y_range: (lowest, highest) of the axis, widened to what is drawn; None for
    that of the points. marks: dashed horizontal lines with their names, such as {"ln K": 6.9}.
    """
    font, heading = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(15 * _SCALE)
    marks = marks or {}
    finite = [point for points in series.values() for point in points if all(map(math.isfinite, point))]
    first, last = _range([x for x, _ in finite])
    xs = [x for x in _ticks(first, last) if first <= x <= last]
    ys = _ticks(*_range([*(y for _, y in finite), *marks.values(), *(y_range or ())]))
    y_names = [_number(y) for y in ys]
    left = _MARGIN + max(map(font.getlength, y_names)) + _MARGIN / 2
    right, top = left + _PLOT_WIDTH, _TITLE + _LINE * len(series)
    bottom = top + _LINES_HEIGHT
    width = max(
        right + max(map(font.getlength, marks), default=0) + 2 * _MARGIN,
        heading.getlength(title) + 2 * _MARGIN,
        left + 3 * _MARGIN + max(map(font.getlength, series), default=0),
    )
    sheet = Image.new("RGB", (round(width), round(bottom + 2 * _AXIS)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _TITLE / 2), title, _INK, heading, anchor="lm")

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + _PLOT_WIDTH * (x - first) / (last - first),
            bottom - _LINES_HEIGHT * (y - ys[0]) / (ys[-1] - ys[0]),
        )

    for y, name in zip(ys, y_names, strict=True):
        draw.line([place(first, y), place(last, y)], _GRID, _SCALE)
        draw.text((left - _MARGIN / 2, place(first, y)[1]), name, _GREY, font, anchor="rm")
    for x in xs:
        draw.text((place(x, ys[0])[0], bottom + _AXIS / 2), _number(x), _GREY, font, anchor="mm")
    draw.text((left + _PLOT_WIDTH / 2, bottom + 1.4 * _AXIS), x_label, _GREY, font, anchor="mm")
    for name, y in marks.items():
        height = place(first, y)[1]
        for start in range(round(left), round(right), 2 * _DASH):
            draw.line([(start, height), (min(start + _DASH, right), height)], _GREY, _SCALE)
        draw.text((right + _MARGIN / 2, height), name, _GREY, font, anchor="lm")
    for number, (name, points) in enumerate(series.items()):
        colour = _SERIES_COLOURS[number % len(_SERIES_COLOURS)]
        for run in _unbroken(points):
            _draw_run(draw, [place(*point) for point in run], colour)
        middle = _TITLE + _LINE * (number + 0.5)
        draw.line([(left, middle), (left + 1.5 * _MARGIN, middle)], colour, 2 * _SCALE)
        draw.text((left + 2 * _MARGIN, middle), name, _INK, font, anchor="lm")
    return sheet


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Charts as the panels of one picture, their bottoms in line. sheets: one or more."""
    height = max(sheet.height for sheet in sheets)
    joined = Image.new("RGB", (sum(sheet.width for sheet in sheets), height), _PAPER)
    left = 0
    for sheet in sheets:
        joined.paste(sheet, (left, height - sheet.height))
        left += sheet.width
    return joined


def _draw_run(draw: ImageDraw.ImageDraw, corners: list[tuple[float, float]], colour: str) -> None:
    if len(corners) > 1:
        draw.line(corners, colour, 2 * _SCALE, joint="curve")
    else:
        (x, y), radius = corners[0], 2 * _SCALE
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)


def _unbroken(points: Points) -> list[Points]:
    """The stretches of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest; of values that are all the same, or none, some room around."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances, the first at or below `low`, the last at or above `high`."""
    rough = (high - low) / _NUM_STEPS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"
