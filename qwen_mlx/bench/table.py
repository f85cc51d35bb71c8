"""Cells in columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """A line for each row; the column of number `left` begins where it stands, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:{'<' if i == left else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
