"""What the command line says of a job: settings, metadata, and the form of a file by its name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from gpt_worker.client.errors import BadInput


class Form(StrEnum):
    """The form of a file of tasks, or of results."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


_ENDINGS = {
    ".json": Form.JSON,
    ".jsonl": Form.JSONL,
    ".ndjson": Form.JSONL,
    ".csv": Form.CSV,
    ".tsv": Form.CSV,
}
_OUT_ENDINGS = {ending: form for ending, form in _ENDINGS.items() if ending != ".tsv"}


@dataclass(frozen=True, slots=True)
class FileForm:
    """What is in a file, and whether it is gzip around that."""

    form: Form
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.form}.gz" if self.packed else str(self.form)


INPUT_FORMS = {str(form): form for packed in (False, True) for form in (FileForm(f, packed) for f in Form)}


def input_form(name: str) -> FileForm:
    """The form of a file of tasks by its name: `.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, each also with `.gz`."""
    form = _form_of(name, _ENDINGS)
    if form is None:
        raise BadInput(
            f"{name} does not tell its form by its name: it ends in none of .json, .jsonl, .csv (or these with .gz); "
            "use --format"
        )
    return form


def output_form(name: str) -> FileForm:
    """The form of a file of results by its name: `.json`, `.jsonl`, `.ndjson`, `.csv`, each also with `.gz`."""
    form = _form_of(name, _OUT_ENDINGS)
    if form is None:
        raise BadInput(f"--out {name} must end in .csv, .jsonl or .json, or one of these with .gz")
    return form


def _form_of(name: str, endings: Mapping[str, Form]) -> FileForm | None:
    path = PurePath(name.lower())
    packed = path.suffix == ".gz"
    form = endings.get(path.with_suffix("").suffix if packed else path.suffix)
    return None if form is None else FileForm(form, packed)


def read_settings(pairs: Sequence[str], named: Mapping[str, str | None]) -> dict[str, Any]:
    """The settings of `--setting key=value`, and of the options that are settings of their own name.

    A value that is JSON is that; every other is a text. Raises BadInput for a pair without "=" and a setting
    given twice; which ones there are is the server's to know.
    """
    settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for pair in pairs:
        name, value = _split("--setting", pair)
        if name in settings:
            raise BadInput(f"the setting {name} is given twice")
        settings[name] = _value(value)
    return settings


def read_metadata(pairs: Sequence[str]) -> dict[str, str]:
    """The texts of `--metadata key=value`."""
    metadata: dict[str, str] = {}
    for pair in pairs:
        name, value = _split("--metadata", pair)
        if name in metadata:
            raise BadInput(f"the metadata {name} is given twice")
        metadata[name] = value
    return metadata


def _split(option: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name.strip():
        raise BadInput(f'{option} {pair!r} must have the form key=value, such as {option} key="a value"')
    return name.strip(), value


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


def _no_json(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's
