"""What an evaluation found: figures with their intervals, and facts; as JSON, as a table, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dino_index.errors import OutputExists, OutputUnwritable
from dino_training.evaluation.bootstrap import Interval
from dino_training.evaluation.plots import Bar, draw_bars

JSON_FILE, TABLE_FILE, PLOT_FILE = "result.json", "table.md", "plot.png"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """keys: where it stands in the JSON, such as ("top1", "20"). value: 0..1. interval: 95 %, by bootstrap."""

    keys: tuple[str, ...]
    value: float
    interval: Interval

    @property
    def name(self) -> str:
        return " ".join(self.keys)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """protocol: what was done, in a few words. facts: JSON values that say on what. remarks: for people."""

    protocol: str
    figures: Sequence[Figure]
    facts: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The figures by their keys, the same keys again under `confidence` with [low, high], and the facts."""
        values: dict[str, Any] = {}
        confidence: dict[str, Any] = {}
        for figure in self.figures:
            _put(values, figure.keys, figure.value)
            _put(confidence, figure.keys, list(figure.interval))
        return values | {"confidence": confidence, "protocol": self.protocol, **self.facts}

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, interval) of each figure, as people read them: percent."""
        return [
            (figure.name, f"{100 * figure.value:.1f} %", "{:.1f} .. {:.1f} %".format(*_in_percent(figure.interval)))
            for figure in self.figures
        ]

    def to_markdown(self) -> str:
        """The table, with the protocol above it and remarks below."""
        lines = [f"{self.protocol}", "", "| figure | value | 95 % interval |", "| --- | ---: | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        if self.remarks:
            lines += ["", *(f"- {remark}" for remark in self.remarks)]
        return "\n".join(lines) + "\n"

    def plot(self) -> Image.Image:
        """The figures as bars."""
        bars = [Bar(figure.name, figure.value, figure.interval) for figure in self.figures]
        return draw_bars(self.protocol, bars)


def refuse_existing_results(folder: Path, force: bool) -> None:
    """Raises OutputExists where the folder holds results already, unless forced."""
    for name in (JSON_FILE, TABLE_FILE, PLOT_FILE):
        if (folder / name).exists() and not force:
            raise OutputExists(f"{folder / name} exists already; choose another --out or add --force to overwrite it")


def write_results(result: EvaluationResult, folder: Path) -> None:
    """result.json, table.md and plot.png in a folder, which is made. Raises OutputUnwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
        (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / TABLE_FILE).write_text(result.to_markdown(), encoding="utf-8")
        result.plot().save(folder / PLOT_FILE)
    except OSError as error:
        raise OutputUnwritable(
            f"the results cannot be written to {folder}: {error.strerror or error}; name another folder with --out"
        ) from error


def _put(values: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


def _in_percent(interval: Interval) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]
