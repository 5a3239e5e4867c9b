"""What the client's command line means: settings, metadata, and the form of a file by its name."""

from typing import Any

import pytest

from gpt_worker.client.errors import BadInput
from gpt_worker.client.options import (
    FileForm,
    Form,
    input_form,
    output_form,
    read_metadata,
    read_settings,
)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("job.json", FileForm(Form.JSON)),
        ("tasks.jsonl", FileForm(Form.JSONL)),
        ("tasks.ndjson", FileForm(Form.JSONL)),
        ("dir.d/REVIEWS.CSV", FileForm(Form.CSV)),
        ("reviews.tsv", FileForm(Form.CSV)),
        ("reviews.csv.gz", FileForm(Form.CSV, packed=True)),
        ("v1.2.jsonl.gz", FileForm(Form.JSONL, packed=True)),
    ],
)
def test_form_of_a_file_is_in_its_name(name: str, form: FileForm) -> None:
    assert input_form(name) == form


@pytest.mark.parametrize("name", ["reviews", "reviews.gz", "reviews.xlsx", ".csv", "csv", "reviews.csv.zip"])
def test_name_that_tells_no_form_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(BadInput, match="--format"):
        input_form(name)


@pytest.mark.parametrize("name", ["answers", "answers.txt", "answers.gz", "answers.tsv", "answers.tsv.gz"])
def test_results_are_written_as_csv_jsonl_or_json_alone_packed_or_not(name: str) -> None:
    assert [output_form(f"a.{form}") for form in Form] == [FileForm(form) for form in Form]
    assert [output_form(f"a.{form}.GZ") for form in Form] == [FileForm(form, packed=True) for form in Form]
    with pytest.raises(BadInput, match=r"must end in \.csv"):
        output_form(name)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=null", None),
        ('a={"type": "json_object"}', {"type": "json_object"}),
        ('a="1"', "1"),
        ("a=gpt-4.1-nano", "gpt-4.1-nano"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=NaN", "NaN"),
        ("a={broken", "{broken"),
        ("a=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_setting_is_json_where_it_can_be_and_a_text_else(pair: str, value: Any) -> None:
    assert read_settings([pair], {}) == {"a": value}


def test_named_options_are_texts_whatever_they_look_like() -> None:
    named = {"instructions": "5", "template": None, "model": "gpt"}

    assert read_settings(["temperature=1"], named) == {"instructions": "5", "model": "gpt", "temperature": 1}


@pytest.mark.parametrize("pair", ["temperature", "=1", " =1", ""])
def test_pair_without_a_name_or_a_value_is_refused(pair: str) -> None:
    with pytest.raises(BadInput, match="key=value"):
        read_settings([pair], {})
    with pytest.raises(BadInput, match="key=value"):
        read_metadata([pair])


def test_what_is_given_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="model is given twice"):
        read_settings(["model=a"], {"model": "b"})
    with pytest.raises(BadInput, match="batch is given twice"):
        read_metadata(["batch=1", "batch=2"])


def test_metadata_stay_texts() -> None:
    assert read_metadata(["batch=42", "note=a=b"]) == {"batch": "42", "note": "a=b"}
