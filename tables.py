"""Rows of values -> text of a csv file. Imports nothing heavy, so that any module may write a table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

DECIMALS = 4
SMALLEST = 1e-9  # what lies nearer to 0 is written as 0


def format_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], decimal: str) -> str:
    """A table as text, cells divided by semicolons; the decimal sign is a "comma" or a "dot".

    Numbers that are not whole have DECIMALS, and below 0.1 so many significant digits: square millimetres are small.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float):
            small = SMALLEST <= abs(value) < 0.1
            decimals = DECIMALS - 1 - math.floor(math.log10(abs(value))) if small else DECIMALS
            return f"{value:.{decimals}f}".replace(".", "," if decimal == "comma" else ".")
        return "" if value is None else str(value)

    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row[column]) for column in columns] for row in rows)
    return text.getvalue()
