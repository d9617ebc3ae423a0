"""Rows -> a short table in plain text, as results print themselves; text made fit to be shown."""

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
    columns = [shown(name) for name in columns]
    texts = [[f"{c:.3f}" if isinstance(c, float) else shown(str(c)) for c in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *texts, strict=True)]
    numeric = [all(isinstance(row[n], int | float) for row in rows) for n in range(len(columns))]
    lines = []
    for cells in (columns, *texts):
        aligned = zip(cells, widths, numeric, strict=True)
        line = "  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned)
        lines.append(line.rstrip())
    return "\n".join(lines)


def shown(text: str) -> str:
    r"""The text in one line that a terminal obeys in nothing: what is not printable is escaped.

    Names of files and what they hold come from others. A terminal would take ESC or U+009B for a
    command, a newline for a line of ours, and a mark of direction would turn what follows around.

    Example:
        >>> print(shown("case\x1b[31m\u202e\n7"))
        case\x1b[31m\u202e\n7
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
