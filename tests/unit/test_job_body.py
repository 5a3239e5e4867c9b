"""A job as it comes in by JSON: what is taken, and which member a refusal names."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config import Settings
from gpt_worker.api.job_body import read_job
from gpt_worker.domain import DeliveryMode, EncodedPrompt, JobSettings, NewTask
from gpt_worker.errors import Invalid, TooLarge
from gpt_worker.gpt import prompt_text
from gpt_worker.jobs import JobRequest
from gpt_worker.splitting import estimate_prompt
from tests import factories

ALL_SETTINGS = {
    "model": "gpt-x",
    "temperature": 0.5,
    "max_chunk_tokens": 100,
    "instructions": "Be brief",
    "template": "{text}!",
    "max_output_tokens": 7,
    "response_format": {"type": "json_object"},
    "priority": -100,
    "deadline_s": 60,
    "max_total_tokens": 1000,
}


@pytest.fixture
def service(tmp_path: Path) -> Settings:
    return factories.settings(data_dir=tmp_path, MAX_TASKS="5", GPT_MODEL="gpt-default")


def read(service: Settings, data: Any = ("hello",), model: str | None = None, **members: Any) -> JobRequest:
    body = {"data": list(data) if isinstance(data, tuple) else data, **members}
    return read_job(body, service, DeliveryMode.INLINE, model)


def tasks(service: Settings, data: Any, **settings: Any) -> list[NewTask]:
    return list(read(service, data, settings=settings).tasks)


def places(service: Settings, **members: Any) -> list[tuple[str | int, ...]]:
    """Where the body is wrong."""
    try:
        read(service, **members)
    except ValidationError as error:
        return [one["loc"] for one in error.errors()]
    except Invalid as error:
        return [one.loc for one in error.errors]
    pytest.fail("it was taken")


# Tasks


def test_object_keeps_its_ids_and_their_order(service: Settings) -> None:
    read_tasks = tasks(service, {"greet": "good morning", "bye": "good night", "1": "one"})

    assert [(task.id, task.prompt) for task in read_tasks] == [
        ("greet", "good morning"),
        ("bye", "good night"),
        ("1", "one"),
    ]


def test_list_counts_its_tasks_and_takes_ids_of_their_own(service: Settings) -> None:
    messages = [{"role": "user", "content": "c"}]

    read_tasks = tasks(service, ["a", {"id": "own", "text": "b"}, {"messages": messages}])

    assert [(task.id, task.prompt) for task in read_tasks] == [("0", "a"), ("own", "b"), ("2", messages)]


def test_variables_are_cut_to_those_of_the_template(service: Settings) -> None:
    data = [{"vars": {"lang": "French", "n": 3, "unused": "x" * 1000}}]

    (task,) = tasks(service, data, template="Count to {n} in {lang}")

    assert task.prompt == {"lang": "French", "n": 3}
    assert task.tokens < 20


def test_text_fills_the_template(service: Settings) -> None:
    (task,) = tasks(service, ["good night"], template="Translate: {text}")

    assert task.prompt == "good night"


def test_estimate_counts_template_and_instructions(service: Settings) -> None:
    (plain,) = tasks(service, ["a" * 400])
    (full,) = tasks(service, ["a" * 400], template="b" * 400 + "{text}", instructions="c" * 800)

    assert (plain.tokens, full.tokens) == (104, 404)


@pytest.mark.parametrize(
    ("template", "task"),
    [
        ("{text}" * 1000, "a" * 600),
        ("{text}" * 1000, "ї"),
        (
            "їжак {{}} {a} {a}, {n}; {yes}",
            {"vars": {"a": "ґанок", "n": -1.5, "yes": True, "unused": "x" * 1000}},
        ),
        ("nothing of it", "a" * 400),
        ("{text}", "a"),
    ],
)
def test_estimate_is_of_the_filled_template(service: Settings, template: str, task: Any) -> None:
    (read_task,) = tasks(service, [task], template=template)

    assert not isinstance(read_task.prompt, EncodedPrompt)
    filled = prompt_text(JobSettings(template=template), read_task.prompt)
    assert read_task.tokens == estimate_prompt(filled)


def test_filled_template_may_be_as_large_as_json(tmp_path: Path) -> None:
    service = factories.settings(data_dir=tmp_path, MAX_JSON_BYTES="1024")
    settings = {"template": "{a}" * 255 + "{b}"}

    read(service, [{"vars": {"a": "ї", "b": "b" * 514}}], settings=settings)

    with pytest.raises(Invalid, match=r"^data\.x: .* more than 1024 bytes \(MAX_JSON_BYTES\)$"):
        read(service, {"x": {"vars": {"a": "ї", "b": "b" * 515}}}, settings=settings)


def test_messages_pass_a_large_template_by(tmp_path: Path) -> None:
    service = factories.settings(data_dir=tmp_path, MAX_JSON_BYTES="1024")
    messages = [{"role": "user", "content": "a" * 40}]

    (task,) = tasks(service, [{"messages": messages}], template="x" * 2000 + "{text}")

    assert (task.prompt, task.tokens) == (messages, estimate_prompt(messages))


def test_task_as_large_as_the_limit_allows_is_taken(service: Settings) -> None:
    assert len(tasks(service, ["a"] * 5)) == 5


def test_too_many_tasks_say_which_limit(service: Settings) -> None:
    with pytest.raises(TooLarge, match="MAX_TASKS"):
        read(service, ["a"] * 6)


def test_id_may_have_200_characters(service: Settings) -> None:
    assert tasks(service, {"x" * 200: "a"})[0].id == "x" * 200


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (None, ("data",)),
        ("hello", ("data",)),
        ([], ("data",)),
        ({}, ("data",)),
        ([1], ("data", 0)),
        ([None], ("data", 0)),
        ([[]], ("data", 0)),
        ([""], ("data", 0)),
        (["a", {}], ("data", 1)),
        ([{"id": "x"}], ("data", 0)),
        ([{"prompt": "a"}], ("data", 0, "prompt")),
        ([{"text": "a", "extra": 1}], ("data", 0, "extra")),
        ([{"text": "a", "messages": []}], ("data", 0)),
        ([{"text": 1}], ("data", 0, "text")),
        ([{"messages": []}], ("data", 0, "messages")),
        ([{"messages": "a"}], ("data", 0, "messages")),
        ([{"messages": ["a"]}], ("data", 0, "messages", 0)),
        ([{"messages": [{"role": "user"}, {"content": "a"}]}], ("data", 0, "messages", 1)),
        ([{"messages": [{"role": 1}]}], ("data", 0, "messages", 0)),
        ([{"vars": {"a": "b"}}], ("data", 0, "vars")),
        ([{"id": 1, "text": "a"}], ("data", 0, "id")),
        ([{"id": "", "text": "a"}], ("data", 0, "id")),
        ([{"id": None, "text": "a"}], ("data", 0, "id")),
        ({"": "a"}, ("data", "")),
        ({"x" * 201: "a"}, ("data", "x" * 201)),
        ({"a": {"id": "b", "text": "c"}}, ("data", "a", "id")),
        ([{"id": "1", "text": "a"}, "b"], ("data", 1)),
        ([{"id": "x", "text": "a"}, {"id": "x", "text": "a"}], ("data", 1)),
    ],
)
def test_bad_data_is_named(service: Settings, data: Any, place: tuple[str | int, ...]) -> None:
    assert places(service, data=data) == [place]


def test_id_given_twice_is_named(service: Settings) -> None:
    with pytest.raises(Invalid, match="'twin'"):
        read(service, [{"id": "twin", "text": "a"}, {"id": "twin", "text": "b"}])


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (["a"], ("data", 0)),
        ([{"vars": []}], ("data", 0, "vars")),
        ([{"vars": {"lang": "French"}}], ("data", 0, "vars")),
        ([{"vars": {"lang": None, "n": 1}}], ("data", 0, "vars", "lang")),
        ([{"vars": {"lang": ["a"], "n": 1}}], ("data", 0, "vars", "lang")),
    ],
)
def test_bad_variables_are_named(service: Settings, data: Any, place: tuple[str | int, ...]) -> None:
    assert places(service, data=data, settings={"template": "{n} in {lang}"}) == [place]


def test_missing_variable_is_named(service: Settings) -> None:
    with pytest.raises(Invalid, match="'lang'"):
        read(service, [{"vars": {"n": 1}}], settings={"template": "{n} in {lang}"})


# Settings


def test_every_setting_is_taken(service: Settings) -> None:
    request = read(service, settings={**ALL_SETTINGS, "delivery": "webhook", "pack": False})

    assert (request.model, request.delivery) == ("gpt-x", DeliveryMode.WEBHOOK)
    assert request.settings.to_json() == {
        name: ALL_SETTINGS[name] for name in ALL_SETTINGS if name != "model"
    } | {"response_format": '{"type":"json_object"}'}  # a text, since it stays in memory with the job


def test_pack_is_taken(service: Settings) -> None:
    data = ["hello", {"text": "hello"}, {"vars": {"text": "hello"}}]

    request = read(service, data, settings={"pack": True, "template": "{text}!"})

    assert request.settings == JobSettings(pack=True, template="{text}!")


def test_messages_that_should_be_packed_are_named(service: Settings) -> None:
    data = {"a": "hello", "b": {"messages": [{"role": "user"}]}}

    assert places(service, data=data, settings={"pack": True}) == [("data", "b", "messages")]


def test_without_settings_the_services_own_count(service: Settings) -> None:
    request = read(service)

    assert (request.model, request.delivery) == ("gpt-default", DeliveryMode.INLINE)
    assert request.settings == JobSettings()


def test_old_names_are_taken(service: Settings) -> None:
    request = read(service, settings={"gpt_type": "gpt-old", "maxTokenCount": 77})

    assert (request.model, request.settings.max_chunk_tokens) == ("gpt-old", 77)


def test_old_and_new_name_may_agree(service: Settings) -> None:
    assert read(service, settings={"gpt_type": "same", "model": "same"}).model == "same"


def test_embedded_model_answers_whatever_is_asked_for(service: Settings) -> None:
    assert read(service, model="tiny", settings={"model": "gpt-x"}).model == "tiny"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unknown", 1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("max_chunk_tokens", 0),
        ("max_chunk_tokens", 1.5),
        ("maxTokenCount", -1),
        ("model", ""),
        ("model", "two words"),
        ("model", 3),
        ("instructions", 3),
        ("template", ""),
        ("template", "{"),
        ("template", "{a!r}"),
        ("max_output_tokens", 0),
        ("response_format", "json"),
        ("priority", 101),
        ("priority", -101),
        ("deadline_s", 0),
        ("deadline_s", -1),
        ("deadline_s", 1e18),
        ("max_total_tokens", 0),
        ("delivery", "pigeon"),
    ],
)
def test_bad_setting_is_named(service: Settings, name: str, value: Any) -> None:
    assert places(service, settings={name: value})[0][:2] == ("settings", name)


def form_of(size_bytes: int) -> dict[str, str]:
    """A response_format that is so long as JSON text."""
    empty = '{"type":"text","ї":"їїї"}'.encode()
    return {"type": "text", "ї": "їїї" + "a" * (size_bytes - len(empty))}


@pytest.mark.parametrize(
    ("name", "longest", "too_long", "limit"),
    [
        ("instructions", "a" * 100_000, "a" * 100_001, "100000 characters"),
        ("template", "{text}" + "a" * 99_994, "{text}" + "a" * 99_995, "100000 characters"),
        ("response_format", form_of(64 << 10), form_of((64 << 10) + 1), "65536 bytes"),
    ],
)
def test_what_stays_in_memory_with_the_job_is_bounded(
    service: Settings, name: str, longest: Any, too_long: Any, limit: str
) -> None:
    read(service, settings={name: longest})

    with pytest.raises((Invalid, ValidationError), match=limit):
        read(service, settings={name: too_long})
    assert places(service, settings={name: too_long}) == [("settings", name)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpt_type": "a", "model": "b"}, "gpt_type"),
        ({"maxTokenCount": 1, "max_chunk_tokens": 2}, "maxTokenCount"),
        ({"pack": True, "response_format": {"type": "text"}}, "pack and response_format"),
    ],
)
def test_settings_that_do_not_go_together_say_so(service: Settings, settings: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        read(service, settings=settings)


# The rest


@pytest.mark.parametrize(
    ("members", "place"),
    [
        ({"extra": 1}, ("extra",)),
        ({"settings": []}, ("settings",)),
        ({"metadata": []}, ("metadata",)),
        ({"metadata": {"a": 1}}, ("metadata", "a")),
        ({"metadata": {"a": "x" * 513}}, ("metadata", "a")),
        ({"metadata": {str(number): "" for number in range(17)}}, ("metadata",)),
    ],
)
def test_bad_member_is_named(service: Settings, members: dict[str, Any], place: tuple[str, ...]) -> None:
    assert places(service, **members) == [place]


def test_missing_data_is_named(service: Settings) -> None:
    with pytest.raises(Invalid) as caught:
        read_job({}, service, DeliveryMode.INLINE, None)

    assert [error.loc for error in caught.value.errors] == [("data",)]


def test_metadata_is_kept(service: Settings) -> None:
    metadata = {str(number): "x" * 512 for number in range(16)}

    assert read(service, metadata=metadata).metadata == metadata
