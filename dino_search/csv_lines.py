"""Rows of CSV tables, one at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable


def csv_line(values: Iterable[object]) -> str:
    r"""One row with its line end, `\n`. None is empty; what holds quotes, commas or line ends of any kind is quoted."""
    text = io.StringIO()
    # Python 3.11 quotes a value with \r only where that is in the line end, and such file names exist.
    csv.writer(text, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n") + "\n"
