"""Rows -> a short table in plain text, as results print themselves."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text of a table, its columns aligned under their names, without a last newline.

    Columns of numbers are aligned to the right, floats with three decimals, others to the left.

    Example:
        >>> print(table(("region", "dice", "cases"), [("WT", 0.91234, 7), ("mean", 0.8, 12)]))
        region   dice  cases
        WT      0.912      7
        mean    0.800     12
    """
    texts = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *texts, strict=True)]
    numeric = [all(isinstance(row[n], int | float) for row in rows) for n in range(len(columns))]
    lines = []
    for cells in (columns, *texts):
        aligned = zip(cells, widths, numeric, strict=True)
        line = "  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned)
        lines.append(line.rstrip())
    return "\n".join(lines)
