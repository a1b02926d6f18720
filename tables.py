"""Rows of values -> text of a csv file. Imports nothing heavy, so that any module may write a table."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def format_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], decimal: str) -> str:
    """A table as text, cells divided by semicolons; the decimal sign is a "comma" or a "dot"."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}".replace(".", "," if decimal == "comma" else ".")
        return "" if value is None else str(value)

    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row[column]) for column in columns] for row in rows)
    return text.getvalue()
