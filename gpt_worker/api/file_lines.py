"""The lines of an uploaded file, numbered from 1, with no more of the file in memory than a line and a piece."""

import re
from collections.abc import Iterable, Iterator

from gpt_worker.errors import TooLarge

BOM = b"\xef\xbb\xbf"


class LineTooLong(TooLarge):
    """A line is over the limit."""

    def __init__(self, number: int, max_bytes: int) -> None:
        super().__init__(f"Line {number} has more than {max_bytes} bytes (MAX_JSON_BYTES).")


class FileLines:
    """Hands out one line after the other.

    Runs of blank lines are passed over in C: a gigabyte of them packs into a megabyte.
    """

    def __init__(self, pieces: Iterable[bytes], max_line_bytes: int, *, blank: bytes) -> None:
        self.number = 0  # of the line that was handed out last
        self._pieces: Iterator[bytes] = iter(pieces)
        self._max_line_bytes = max_line_bytes
        self._blank = blank
        self._blanks = re.compile(b"[%s]*+" % re.escape(blank))
        self._block = b""
        self._at = 0

    def next(self, *, skip_blank: bool) -> bytes | None:
        """The next line with its end, or None after the last; without the BOM of the first. Raises LineTooLong."""
        begin = self._at
        end = self._block.find(b"\n", begin) + 1
        size_bytes = end - begin
        if 0 < size_bytes <= self._max_line_bytes and self.number and self._block[begin] not in self._blank:
            self._at = end  # the short way of nearly every line
            self.number += 1
            return self._block[begin:end]
        while True:
            if skip_blank:
                self._skip_blank()
            end = self._block.find(b"\n", self._at) + 1
            if not end and self._fill(b"\n"):
                continue
            line = self._take(end)
            if self.number == 1:
                line = line.removeprefix(BOM)
            if not line or (skip_blank and self._blanks.fullmatch(line)):
                if end:
                    continue
                return None
            return line

    def peek_whole(self) -> bytes:
        """The lines that are in memory whole, with their ends; nothing where one of them may be over the limit."""
        end = self._block.rfind(b"\n", self._at) + 1
        return self._block[self._at : end] if self._at < end <= self._at + self._max_line_bytes else b""

    def pass_over(self, whole: bytes) -> None:
        """The lines that were just seen are done with."""
        self._at += len(whole)
        self.number += whole.count(b"\n")

    def next_with(self, mark: bytes) -> bytes | None:
        """The next lines up to the first with `mark` in it, or what is left; `number` is that of the last.

        Raises LineTooLong for more than the limit of one.
        """
        while True:
            found = self._block.find(mark, self._at)
            end = self._block.find(b"\n", found) + 1 if found >= 0 else 0
            if end or not self._fill(b"\n" if found >= 0 else mark):
                return self._take(end) or None

    def _take(self, end: int) -> bytes:
        taken = self._block[self._at : end or None]
        if len(taken) > self._max_line_bytes:
            raise LineTooLong(self.number + 1, self._max_line_bytes)
        self._at += len(taken)
        self.number += taken.count(b"\n") + (taken != b"" and not end)
        return taken

    def _skip_blank(self) -> None:
        found = self._blanks.match(self._block, self._at)
        assert found is not None
        after_newline = self._block.rfind(b"\n", self._at, found.end()) + 1
        if after_newline:
            self.number += self._block.count(b"\n", self._at, after_newline)
            self._at = after_newline

    def _fill(self, mark: bytes) -> bool:
        """Read on, to a piece with the mark in it; False at the end of the file."""
        parts = [self._block[self._at :]]
        size_bytes = len(parts[0])
        self._at = 0
        more = False
        for piece in self._pieces:
            more = True
            parts.append(piece)
            size_bytes += len(piece)
            if mark in piece:
                break
            if size_bytes > self._max_line_bytes:
                raise LineTooLong(self.number + 1, self._max_line_bytes)
        self._block = b"".join(parts)
        return more
