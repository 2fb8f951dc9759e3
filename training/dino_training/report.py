"""The report of a run: one HTML page with its figures, curves, pictures and settings, made from the run's files.

It can be written at any time, also of a run that is still going on, was killed or was moved to another machine.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import yaml
from jinja2 import Environment, PackageLoader
from PIL import Image

from dino_index.errors import OutputUnwritable

REPORT_NAME = "report.html"
MAX_ATTENTION_SHEETS = 12
MAX_POINTS = 400
"""Points of a curve that are drawn; more would not be seen."""
MAX_HOVERS = 100

_MAX_DOTS = 60
_SHEET_QUALITY = 80

Record = dict[str, Any]
Point = tuple[float, float]
_T = TypeVar("_T")


def write_report(run: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and gives back its path.

    Read are recipe.yaml, run.json, metrics.jsonl, views.png and attention/step-NNNNNNNN.png. What is missing is left
    out; what is damaged as well, and said so. Raises OutputUnwritable.
    """
    history = _read_history(run)
    views = _data_uri(run / "views.png", history.problems)
    attention = list(_attention_sheets(run, history))
    environment = Environment(
        loader=PackageLoader("dino_training"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": _short, "thousands": _thousands, "time": _time, "plain": _plain}
    page = environment.get_template("report.html.j2").render(
        history=history,
        charts=_charts(history),
        views=views,
        attention=attention,
        now=datetime.now(UTC).isoformat(),
    )
    path = run / REPORT_NAME
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        # Names of files may hold bytes that are no UTF-8.
        unfinished.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputUnwritable(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


# What a run has left in its folder.


@dataclass
class History:
    """What is known of a run. A step that was repeated after the run was resumed counts once."""

    recipe: Record = field(default_factory=dict)
    info: Record = field(default_factory=dict)
    """run.json."""
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    remarks: list[Record] = field(default_factory=list)
    """Warnings of the start, without a step, then those of later steps; each message of a step once."""
    problems: list[str] = field(default_factory=list)
    """What in the folder could not be read."""

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", "dino"))

    @property
    def last(self) -> Record:
        """The last step; empty before the first one."""
        return self.steps[-1] if self.steps else {}

    @property
    def best(self) -> Record:
        """The evaluation with the highest main figure, the first of several; empty where there is none."""
        return max(self.evaluations, key=lambda record: _number(record, self.main_figure) or 0.0, default={})

    @property
    def main_figure(self) -> str:
        has_labels = any(_number(record, "knn_top1") is not None for record in self.evaluations)
        return "knn_top1" if has_labels else "copies_found"

    @property
    def num_prototypes(self) -> int | None:
        """K; None for a loss without prototypes."""
        known = self.info.get("num_prototypes") or self.recipe.get("num_prototypes")
        uses_prototypes = self.recipe.get("loss", "cross_entropy") in ("cross_entropy", "kl")
        return known if uses_prototypes and isinstance(known, int) and known > 1 else None

    @property
    def ln_k(self) -> float | None:
        return None if self.num_prototypes is None else math.log(self.num_prototypes)

    @property
    def unreadable(self) -> int:
        return int(max(_number(self.last, "unreadable") or 0, _number(self.info, "unreadable") or 0))


def _read_history(run: Path) -> History:
    history = History()
    history.recipe = _read_mapping(run / "recipe.yaml", yaml.safe_load, history.problems)
    history.info = _read_mapping(run / "run.json", json.loads, history.problems)
    warnings = history.info.get("warnings")
    history.remarks = [{"message": str(message)} for message in warnings] if isinstance(warnings, list) else []
    for record in _read_metrics(run / "metrics.jsonl", history.problems):
        if record.get("event") == "remark" and record not in history.remarks:
            history.remarks.append(record)
        elif record.get("event") in ("step", "evaluation"):
            earlier = history.steps if record["event"] == "step" else history.evaluations
            while earlier and earlier[-1].get("step", 0) >= record.get("step", math.inf):
                earlier.pop()  # from after the checkpoint that the run was resumed from
            earlier.append(record)
    return history


def _read_mapping(path: Path, parse: Any, problems: list[str]) -> Record:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    return values if isinstance(values, dict) else {}


def _read_metrics(path: Path, problems: list[str]) -> Iterator[Record]:
    """The records, in the order they were written. A last line that was cut off is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return
    num_damaged = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            num_damaged += number < len(lines)
            continue
        if isinstance(record, dict):
            yield record
    if num_damaged:
        problems.append(f"lines of {path.name} passed over because they are damaged: {num_damaged}")


def _number(record: Record, key: str) -> float | None:
    """The value if it is a finite number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# Pictures.


def _data_uri(path: Path, problems: list[str]) -> str | None:
    """The picture as WebP, a tenth of the size of its PNG; None if there is none or it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as sheet:
            sheet.save(buffer, "WEBP", quality=_SHEET_QUALITY)
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, ValueError):  # a PNG that is being written, or was when the run was killed
        problems.append(f"{path.name} cannot be read as a picture")
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _attention_sheets(run: Path, history: History) -> Iterator[tuple[str, Record]]:
    """(data URI, what is known of the step), in order of time: evenly chosen, the first and the last among them."""
    by_step = {record.get("step"): record for record in (*history.steps, *history.evaluations)}
    sheets = sorted(
        (int(found[1]), path)
        for path in (run / "attention").glob("step-*.png")
        if (found := re.fullmatch(r"step-(\d+)", path.stem))
    )
    for step, path in evenly_chosen(sheets, MAX_ATTENTION_SHEETS):
        if (source := _data_uri(path, history.problems)) is not None:
            yield source, {"step": step} | by_step.get(step, {})


def evenly_chosen(items: Sequence[_T], at_most: int) -> list[_T]:
    """Some of the items in their order, the first and the last among them. at_most: 2 or more."""
    if len(items) <= at_most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (at_most - 1))] for number in range(at_most)]


# Curves.


@dataclass(frozen=True)
class Curve:
    """One line of a chart, in its units. dots: points that are marked; all where they are few."""

    name: str
    points: list[Point]
    dots: list[Point]


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs to draw a chart as SVG: positions in the chart's own units, and texts."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]
    """Horizontal lines to compare with, such as ln K."""
    curves: list[Curve]
    hovers: list[tuple[float, float, str]]
    """(left, width, text) of strips that say what was measured there."""
    summary: str
    """For those who do not see it."""


def _charts(history: History) -> dict[str, Chart | None]:
    steps, evaluations, ln_k = history.steps, history.evaluations, history.ln_k
    highest = {} if ln_k is None else {f"ln K = {_short(ln_k)}": ln_k}
    starts_at_ln_k = history.recipe.get("loss", "cross_entropy") == "cross_entropy"
    entropies = {"teacher_entropy": "of one view", "mean_entropy": "of the batch’s mean"}
    figures = {"knn_top1": "k-NN accuracy", "copies_found": "copies found"}
    return {
        "figures": draw_chart(evaluations, figures, unit="%", from_zero=True),
        "kl": draw_chart(steps, {"kl": "KL divergence"}, from_zero=True),
        "loss": draw_chart(steps, {"loss": "loss"}, marks=highest if starts_at_ln_k else {}),
        "entropy": draw_chart(steps, entropies, marks={"0": 0.0} | highest),
        "spread": draw_chart(evaluations, {"embedding_std": "spread"}, from_zero=True, small=True),
        "speed": draw_chart(steps, {"images_per_second": "images/s"}, from_zero=True, small=True),
        "learning_rate": draw_chart(steps, {"learning_rate": "learning rate"}, from_zero=True, small=True),
        "weight_decay": draw_chart(steps, {"weight_decay": "weight decay"}, from_zero=True, small=True),
        "momentum": draw_chart(steps, {"momentum": "momentum"}, small=True),
        "temperature": draw_chart(steps, {"teacher_temperature": "teacher temperature"}, from_zero=True, small=True),
    }


def draw_chart(
    records: Sequence[Record],
    names: dict[str, str],
    *,
    marks: dict[str, float] | None = None,
    unit: str = "",
    from_zero: bool = False,
    small: bool = False,
) -> Chart | None:
    """A chart of the records' values under these keys over the images seen; None where there is not one number.

    names: what each key's curve is called. marks: text and height of the lines to compare with. unit: follows each
    value; with "%", fractions are shown times 100.
    """
    scale = 100 if unit == "%" else 1
    measured = {
        name: [
            (x, y * scale)
            for record in records
            if (x := _number(record, "images")) is not None and (y := _number(record, key)) is not None
        ]
        for key, name in names.items()
    }
    measured = {name: points for name, points in measured.items() if points}
    if not measured:
        return None
    width, height = (340.0, 170.0) if small else (480.0, 230.0)
    left, right, top, bottom = 48.0, width - 14, 20.0, height - 38
    ys = [y for points in measured.values() for _, y in points] + list((marks or {}).values())
    y_ticks = _ticks(min(ys + [0.0] * from_zero), max(ys), 4 if small else 5)
    last_x = max(x for points in measured.values() for x, _ in points) or 1.0

    def across(x: float) -> float:
        return round(left + (right - left) * x / last_x, 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    curves = []
    for name, points in measured.items():
        drawn = [(across(x), up(y)) for x, y in thin(points, MAX_POINTS)]
        curves.append(Curve(name, drawn, drawn if len(points) <= _MAX_DOTS else drawn[-1:]))
    return Chart(
        width, height, left, right, top, bottom,
        x_ticks=[(across(x), _compact(x)) for x in _ticks(0, last_x, 4) if x <= last_x],
        y_ticks=[(up(y), _tick_label(y, y_ticks[1] - y_ticks[0]) + unit) for y in y_ticks],
        marks=[(up(y), text) for text, y in (marks or {}).items()],
        curves=curves,
        hovers=[
            (across(start), round(across(end) - across(start), 1), _in_words(record, names, scale, unit))
            for start, end, record in _strips([r for r in records if any(_number(r, key) is not None for key in names)])
        ],
        summary="; ".join(_summary(name, [y for _, y in points], unit) for name, points in measured.items()),
    )  # fmt: skip


def thin(points: Sequence[Point], at_most: int) -> list[Point]:
    """Fewer points with the same outline: of each run of neighbours the lowest and the highest, in their order.

    The first and the last point stay. at_most: 4 or more.
    """
    if len(points) <= at_most:
        return list(points)
    inner = points[1:-1]
    num_runs = (at_most - 2) // 2
    bounds = [round(number * len(inner) / num_runs) for number in range(num_runs + 1)]
    kept = [points[0]]
    for start, end in pairwise(bounds):
        places = range(start, end)
        ends = {min(places, key=lambda place: inner[place][1]), max(places, key=lambda place: inner[place][1])}
        kept += [inner[place] for place in sorted(ends)]
    return [*kept, points[-1]]


def _ticks(lowest: float, highest: float, about: int) -> list[float]:
    """Round numbers at equal steps, from the lowest value or just below to the highest or just above."""
    if highest - lowest <= 1e-9 * max(abs(lowest), abs(highest)):
        margin = abs(highest) * 0.01 or 1.0
        lowest, highest = lowest - margin, highest + margin
    magnitude = 10.0 ** math.floor(math.log10((highest - lowest) / about))
    step = next(step for factor in (1, 2, 5, 10) if (highest - lowest) / (step := factor * magnitude) <= about)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _strips(records: Sequence[Record]) -> Iterator[tuple[float, float, Record]]:
    """(start, end, record), side by side over the images seen: each reaches halfway to its neighbours."""
    measured = [(x, record) for record in records if (x := _number(record, "images")) is not None]
    chosen = evenly_chosen(measured, MAX_HOVERS)
    middles = [(first[0] + second[0]) / 2 for first, second in pairwise(chosen)]
    yield from (
        (start, end, record)
        for start, end, (_, record) in zip([0.0, *middles], [*middles, chosen[-1][0]], chosen, strict=True)
    )


def _in_words(record: Record, names: dict[str, str], scale: float, unit: str) -> str:
    epoch = _number(record, "epoch")
    where = f"{_thousands(record['images'])} images" + ("" if epoch is None else f", epoch {epoch:.4g}")
    values = [
        f"{name}: {_short(value * scale)}{unit}"
        for key, name in names.items()
        if (value := _number(record, key)) is not None
    ]
    return "\n".join([where, *values])


def _summary(name: str, values: Sequence[float], unit: str) -> str:
    first, last, lowest, highest = (_short(value) + unit for value in (values[0], values[-1], min(values), max(values)))
    return f"{name} from {first} to {last}, lowest {lowest}, highest {highest}"


# Numbers as text.


def _short(value: float) -> str:
    """Four digits: 6.931, 0.00025, 2e-06; all before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _compact(value: float) -> str:
    """Thousands and millions: 250k, 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _tick_label(value: float, step: float) -> str:
    """As many decimals as the step has; small numbers with many of them as powers of ten."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if value == 0:
        return "0"
    if decimals <= 4 or abs(value) >= 0.01:
        return f"{value:,.{decimals}f}"
    places = max(0, math.floor(math.log10(abs(value))) + decimals)
    digits, exponent = f"{value:.{places}e}".split("e")
    return f"{digits}e{int(exponent)}"


def _time(iso_time: object) -> str:
    """In UTC, to the minute; as it stands if it is no ISO time."""
    try:
        return datetime.fromisoformat(str(iso_time)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(iso_time)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
