"""Lines of a file: none lost, all numbered, however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_worker.api.file_lines import FileLines, LineTooLong
from gpt_worker.errors import TooLarge


def read(
    pieces: list[bytes], max_line_bytes: int = 1000, blank: bytes = b" \t\r\n"
) -> list[tuple[int, bytes]]:
    lines = FileLines(pieces, max_line_bytes, blank=blank)
    found: list[tuple[int, bytes]] = []
    while (line := lines.next(skip_blank=True)) is not None:
        found.append((lines.number, line))
    return found


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"", []),
        (b"\n", []),
        (b" \r\n\t\n  ", []),
        (b"a", [(1, b"a")]),
        (b"a\n", [(1, b"a\n")]),
        (b"a\r\nb", [(1, b"a\r\n"), (2, b"b")]),
        (b"\n\na\n \n\nb\n\n", [(3, b"a\n"), (6, b"b\n")]),
        (b"  a\n", [(1, b"  a\n")]),
        (b"\n  a\n", [(2, b"  a\n")]),
        (b"\xef\xbb\xbfa\n", [(1, b"a\n")]),
        (b"\xef\xbb\xbf\na\n", [(2, b"a\n")]),
        (b"\xef\xbb\xbf", []),
        (b"a\n\xef\xbb\xbfb\n", [(1, b"a\n"), (2, b"\xef\xbb\xbfb\n")]),
    ],
)
def test_lines_that_are_not_blank_come_with_their_numbers(raw: bytes, lines: list[tuple[int, bytes]]) -> None:
    assert read([raw]) == lines
    assert read([bytes([byte]) for byte in raw]) == lines


@given(st.text("ab \r\n"), st.integers(1, 9))
def test_lines_are_those_that_a_plain_split_finds(text: str, size: int) -> None:
    raw = text.encode()
    expected = [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip(b" \t\r\n")]

    found = read([raw[start : start + size] for start in range(0, len(raw), size)])

    assert [(number, line.rstrip(b"\n")) for number, line in found] == expected


def test_lines_go_on_up_to_a_mark() -> None:
    lines = FileLines([b"a\nb\n", b"c\nd", b'"e\nf\n'], 1000, blank=b"\n")

    assert lines.next(skip_blank=True) == b"a\n"
    assert lines.next_with(b'"') == b'b\nc\nd"e\n'
    assert lines.number == 4
    assert lines.next_with(b'"') == b"f\n"
    assert lines.next_with(b'"') is None


@pytest.mark.parametrize(
    "pieces", [[b"ok\n" + b"x" * 11], [b"ok\n", *[b"x"] * 20], [b"ok\n" + b"x" * 11 + b"\n"]]
)
def test_line_over_the_limit_is_refused_with_its_number(pieces: list[bytes]) -> None:
    with pytest.raises(LineTooLong, match="Line 2 has more than 10 bytes"):
        read(pieces, max_line_bytes=10)


def test_endless_line_is_not_read_to_its_end() -> None:
    read_pieces: list[int] = []

    def endless() -> object:
        while True:
            read_pieces.append(1)
            yield b"x" * 100

    with pytest.raises(TooLarge):
        read(endless(), max_line_bytes=1000)  # type: ignore[arg-type]

    assert len(read_pieces) == 11
