"""The table at the end: what was looked at, what was wanted, what came. Pure: rows in, text out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `ok` False is a breach, and the run's exit status 1."""

    what: str
    wanted: str
    got: str
    ok: bool


def none_of(what: str, breaches: Sequence[str], of: int | None = None) -> Row:
    """A row that wants 0; the first breaches stand in it."""
    counted = str(len(breaches)) if of is None else f"{len(breaches)} of {of}"
    told = "".join(f"; {breach}" for breach in breaches[:3])
    return Row(what, "0", counted + told, not breaches)


def fact(what: str, got: object) -> Row:
    """A row with nothing to judge."""
    return Row(what, "–", str(got), True)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | wanted | got | ok |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.what, row.wanted, row.got, "yes" if row.ok else "**no**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
