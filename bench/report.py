"""The table: what was wanted, what we reached, what the peers did. Pure: rows in, Markdown out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `reached` None: there is nothing to judge."""

    what: str
    wanted: str
    ours: str
    peers: str = "–"
    reached: bool | None = None


def judged(what: str, wanted: str, ours: str, checks: Iterable[bool], peers: str = "–") -> Row:
    """A row that is reached when every check holds."""
    return Row(what, wanted, ours, peers, all(checks))


MARKS = {True: "yes", False: "**no**", None: "–"}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | wanted | ours | reached | peers |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.what, row.wanted, row.ours, MARKS[row.reached], row.peers)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def document(rows: Sequence[Row], machine: Mapping[str, object]) -> str:
    """The whole page: the table, and what it was measured on."""
    told = "; ".join(f"{name} {value}" for name, value in machine.items())
    return (
        f"# Benchmark\n\n{table(rows)}\n\n"
        "Medians, with the lowest and the highest of the runs in brackets. Ratios are of the same run.\n\n"
        f"Measured on: {told}.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
