"""Bar charts of figures with their intervals, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn in twice the pixels, for sharp screens
_LINE, _MARGIN, _TITLE = 26 * _SCALE, 16 * _SCALE, 40 * _SCALE
_AXIS = 30 * _SCALE
_PLOT_WIDTH = 420 * _SCALE
_INK, _GREY, _GRID, _BAR, _PAPER = "#1b1f24", "#667080", "#dde2e8", "#5b8def", "#ffffff"
_TICKS = (0, 20, 40, 60, 80, 100)


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
