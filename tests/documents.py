"""Reads the project's Markdown: headings, links, and fenced code blocks with the section that they stand in."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `text` ends with a newline."""

    language: str
    text: str
    section: str


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    @property
    def anchor(self) -> str:
        """What a link to it says after "#", as GitHub makes it."""
        return re.sub(r"[^\w\- ]", "", self.text.lower()).replace(" ", "-")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def read_blocks(name: str) -> list[Block]:
    """Every code block, in order."""
    text = read(name)
    return [Block(found[1], found[2], _section(text[: found.start()])) for found in FENCE.finditer(text)]


def read_headings(name: str) -> list[Heading]:
    return [Heading(len(marks), text) for marks, text in HEADING.findall(FENCE.sub("", read(name)))]


def read_links(name: str) -> list[str]:
    """The targets of every link in the prose."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(name)))
    return [found["target"] for found in LINK.finditer(prose)]


def _section(text_before: str) -> str:
    return str(HEADING.findall(FENCE.sub("", text_before))[-1][1])
