"""Multipart forms: known parts once each, the file on disk and gone afterwards."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from urllib3 import encode_multipart_formdata
from werkzeug.exceptions import BadRequest

from gpt_worker.api.form_parts import read_form
from gpt_worker.errors import Invalid, TooLarge

BOUNDARY = "limit"
MAX_SMALL_BYTES = 1000
FILE = ("file", ("a.csv", b"text\na\n"))


def form(*parts: tuple[str, str | bytes | tuple[str, bytes]]) -> bytes:
    raw: bytes = encode_multipart_formdata([*parts], BOUNDARY)[0]
    return raw


def read(pieces: Iterable[bytes], folder: Path, boundary: str = BOUNDARY) -> dict[str, bytes]:
    """The contents by name."""
    with read_form(pieces, boundary, folder, MAX_SMALL_BYTES) as parts:
        assert [*folder.iterdir()] == []  # the file has no name
        return {name: part.file.read() if part.file else bytes(part.content) for name, part in parts.items()}


@pytest.mark.parametrize("size", [1, 5, 1 << 16])
def test_parts_come_by_name_in_any_order(tmp_path: Path, size: int) -> None:
    content = b"--limi\r\n--limitless\r\n\r" * 50
    raw = form(("file", ("a.csv", content)), ("metadata", "{}"), ("settings", b'{"priority": 1}'))

    parts = read((raw[at : at + size] for at in range(0, len(raw), size)), tmp_path)

    assert parts == {"file": content, "metadata": b"{}", "settings": b'{"priority": 1}'}


def test_form_may_be_cut_anywhere(tmp_path: Path) -> None:
    raw = form(FILE, ("settings", "{}"))

    for cut in range(len(raw)):
        parts = read([raw[:cut], raw[cut:]], tmp_path)
        assert parts == {"file": b"text\na\n", "settings": b"{}"}, cut


def test_equal_parts_have_equal_digests_whatever_the_boundary(tmp_path: Path) -> None:
    other, _ = encode_multipart_formdata([FILE], "another")

    with (
        read_form([form(FILE)], BOUNDARY, tmp_path, 10) as one,
        read_form([other], "another", tmp_path, 10) as two,
    ):
        assert one["file"].digest.digest() == two["file"].digest.digest()


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (form(), "file"),
        (form(("settings", "{}")), "file"),
        (form(FILE, ("data", "x")), "data"),
        (form(FILE, FILE), "file"),
        (form(("settings", "{}"), ("settings", "{}"), FILE), "settings"),
    ],
)
def test_part_that_is_missing_unknown_or_repeated_is_named(tmp_path: Path, raw: bytes, name: str) -> None:
    with pytest.raises(Invalid) as refused:
        read([raw], tmp_path)

    assert [error.loc for error in refused.value.errors] == [(name,)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"text\na\n",
        b"--limit",
        b"--other\r\n\r\n--other--",
        form(FILE)[:-4],
        form(FILE)[:60],
        b"--limit\r\n\r\nno headers\r\n--limit--\r\n",
        b"--limit\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--limit--\r\n",
        b"--limit\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n--limit--\r\n",
    ],
)
def test_what_is_no_whole_form_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read([raw], tmp_path)


@pytest.mark.parametrize("boundary", ["", "x" * 71])
def test_boundary_is_needed(tmp_path: Path, boundary: str) -> None:
    with pytest.raises(BadRequest, match="boundary"):
        read([form(FILE)], tmp_path, boundary)


def test_small_part_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="MAX_JSON_BYTES"):
        read([form(("settings", "x" * 1001))], tmp_path)


@pytest.mark.parametrize(
    "endless",
    [b"preamble ", b"--limit\r\nX-Header: x\r\n", b"--limit\r\n" + b"X" * 1000],
    ids=["preamble", "headers", "header"],
)
def test_what_never_becomes_a_part_is_not_kept(tmp_path: Path, endless: bytes) -> None:
    with pytest.raises(BadRequest):
        read((endless for _ in range(1_000_000)), tmp_path)
