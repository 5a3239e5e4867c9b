"""Several tasks in one request: no reply, however it lies, gives a task another's answer."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gpt_worker.domain import JobSettings
from gpt_worker.packing import (
    FORM_TOKENS,
    INSTRUCTION,
    RESPONSE_FORMAT,
    PackSize,
    PackTokens,
    halves,
    packed_message,
    packed_settings,
    plan,
    read_answers,
    share,
)
from gpt_worker.splitting import estimate_prompt, estimate_tokens
from tests.clock import unhurried
from tests.upstream.answers import schema_fault

TWO = [{"n": 1, "text": "one"}, {"n": 2, "text": "two"}]


def written(items: list[Any]) -> str:
    return json.dumps({"answers": items}, ensure_ascii=False)


# What is sent


def test_tasks_are_numbered_from_one() -> None:
    assert (
        packed_message(["Привіт", '"two"'])
        == '{"tasks": [{"n": 1, "text": "Привіт"}, {"n": 2, "text": "\\"two\\""}]}'
    )


def test_pack_has_the_jobs_settings_and_its_own_form() -> None:
    job = JobSettings(temperature=0.5, instructions="Be brief", template="{text}!", max_output_tokens=7)

    assert packed_settings(job, 10) == JobSettings(
        temperature=0.5,
        instructions=f"Be brief\n\n{INSTRUCTION}",
        response_format=RESPONSE_FORMAT,
        max_output_tokens=230,
    )


def test_what_the_caller_did_not_set_is_not_sent() -> None:
    assert packed_settings(JobSettings(), 10) == JobSettings(
        instructions=INSTRUCTION, response_format=RESPONSE_FORMAT
    )


def test_form_of_the_reply_is_strict() -> None:
    form: Any = json.loads(RESPONSE_FORMAT)["json_schema"]

    assert form["strict"] is True
    assert schema_fault(form["schema"]) is None


# What is read


@pytest.mark.parametrize(
    ("items", "answers"),
    [
        (TWO, {0: "one", 1: "two"}),
        ([TWO[1], TWO[0]], {0: "one", 1: "two"}),
        ([*TWO, TWO[0]], {0: "one", 1: "two"}),
        ([*TWO, {"n": 3, "text": "nobody asked"}], {0: "one", 1: "two"}),
        ([*TWO, {"n": 1, "text": "other"}], {1: "two"}),
        ([*TWO, {"n": 1, "text": "other"}, TWO[0]], {1: "two"}),
        ([*TWO, {"n": 1, "text": None}], {1: "two"}),
        ([*TWO, None, 7, "1", [], {}, {"n": 2}, {"text": "two"}], {0: "one"}),
        (TWO[:1], {0: "one"}),
        ([TWO[0], {"n": 2, "text": ""}], {0: "one", 1: ""}),
        ([TWO[0], {"n": "2", "text": "two"}], {0: "one"}),
        ([TWO[0], {"n": 2.0, "text": "two"}], {0: "one"}),
        ([{"n": True, "text": "one"}, TWO[1]], {}),
        ([{**TWO[0], "why": "it is"}, TWO[1]], {0: "one", 1: "two"}),
        ([], {}),
    ],
)
def test_only_what_is_certain_is_taken(items: list[Any], answers: dict[int, str]) -> None:
    assert read_answers(written(items), 2) == answers


@pytest.mark.parametrize(
    "numbers",
    [[0, 1], [2, 3], [1001, 1002], [0, 1, 2], [2], [-1, 0, 1, 2], [1, 3], [1, 10**30], [-(10**30), 1, 2]],
)
def test_numbers_that_stray_spoil_the_others(numbers: list[int]) -> None:
    items = [{"n": n, "text": f"the answer to who knows what: {n}"} for n in numbers]

    assert read_answers(written(items), 2) == {}


def test_conflict_beside_an_extra_spoils_the_others() -> None:
    items = [*TWO, {"n": 2, "text": "other"}, {"n": 3, "text": "three"}]

    assert read_answers(written(items), 2) == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        " ",
        "```json",
        "```json\n```",
        "I'm sorry",
        "null",
        '"',
        "[]",
        json.dumps(TWO),
        '{"answers": null}',
        '{"answers": {"1": "one"}}',
        '{"answers": "one"}',
        written(TWO) + " Wait, that was wrong: " + written(TWO),
        written(TWO)[:-2] + " x",
        '{"answers": [{"n": 1, "text": "one", "n": 2}, {"n": 2, "text": "two"}]}',
        '{"answers": [{"n": 1, "text": "one"}, {"n": 1, "text": "o"}], "answers": [{"n": 1, "text": "x"}]}',
        "[" * 100_000,
        '{"answers":' * 100_000,
        '{"answers": [{"n": 1, "text": "one"}, {"n": ' + "9" * 10_000,
        '{"answers": [{"n": 1, "text": "\\ud83d"}, ',
        "\ud83d",
    ],
)
def test_odd_reply_holds_no_answers(content: str) -> None:
    assert read_answers(content, 2) == {}


@pytest.mark.parametrize("around", [("", ""), ("\n", " "), ("```json\n", "\n```"), ("```\n", "```\n")])
def test_fence_around_the_reply_is_passed_over(around: tuple[str, str]) -> None:
    assert read_answers(around[0] + written(TWO) + around[1], 2) == {0: "one", 1: "two"}


@pytest.mark.parametrize("number_first", [True, False])
def test_cut_reply_keeps_its_whole_answers(number_first: bool) -> None:
    truth = [{"n": n, "text": f'"{n}" ї👋'} for n in range(1, 13)]
    items = truth if number_first else [dict(reversed(item.items())) for item in truth]
    content = written(items)
    begins = [content.index(json.dumps(item, ensure_ascii=False)) for item in items]

    for end in range(len(content)):
        kept = read_answers(content[:end], 12)

        whole = max(0, sum(begin < end for begin in begins) - 1)
        assert kept == {index: truth[index]["text"] for index in range(whole)}


def test_cut_reply_whose_brackets_somebody_closed_loses_its_last_answer() -> None:
    assert read_answers(written(TWO), 2, cut=True) == {0: "one"}


def items_of(truth: dict[int, str], number_first: bool) -> list[Any]:
    return [{"n": n, "text": t} if number_first else {"text": t, "n": n} for n, t in truth.items()]


FEW = st.sampled_from([(), (), (0,), (1,), (2, 5)])
WRONG_TYPES = st.sampled_from([{"n": "1"}, {"n": None}, {"n": True}, {"n": 1.0}, {"text": 7}, {"text": None}])


@st.composite
def truths(draw: st.DrawFn) -> dict[int, str]:
    """The true answer of every n: each another, and none the beginning of another's."""
    texts = draw(st.lists(st.text(max_size=8), min_size=1, max_size=13))
    return {n: f"{n}. {text}" for n, text in enumerate(texts, 1)}


@st.composite
def lies(draw: st.DrawFn, truth: dict[int, str]) -> str:
    """A reply that lies about the truth in any of the ways that can be seen through."""
    shift = draw(st.sampled_from([0] * 6 + [-2, -1, 1, 2, 1000]))
    items = items_of({n + shift: text for n, text in truth.items()}, draw(st.booleans()))
    if shift >= 0:  # one that counts from 0 and leaves out its first looks like one that leaves out the last
        dropped, wrong = draw(FEW), draw(FEW)
        items = [item for index, item in enumerate(items) if index not in dropped]
        items = [item | draw(WRONG_TYPES) if index in wrong else item for index, item in enumerate(items)]
    repeated = draw(st.lists(st.sampled_from(items), max_size=2)) if items else []
    conflicting = [{**item, "text": "a lie"} for item in repeated if draw(st.booleans())]
    strays = draw(st.sampled_from([[], [], [], [len(truth) + 1], [1 << 70], [0]]))
    extras = [{"n": n, "text": "nobody asked"} for n in strays]
    junk: list[Any] = draw(
        st.lists(st.sampled_from([None, 7, "1", [], {}, {"n": None, "text": "a lie"}]), max_size=2)
    )
    if shift == 0:
        items = draw(st.permutations(items))
    return written([*items, *draw(st.permutations([*repeated, *conflicting, *extras, *junk]))])


@settings(unhurried, max_examples=500)
@given(data=st.data(), truth=truths())
def test_no_lie_gives_a_task_anything_but_its_own_answer(data: st.DataObject, truth: dict[int, str]) -> None:
    content = data.draw(lies(truth))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    junk = st.sampled_from([""] * 20 + [" ", "x", "```json\n", "```", "]", "}", '"'])
    before, after = data.draw(junk), data.draw(junk)

    answers = read_answers(before + content + after, len(truth), cut=data.draw(st.booleans()))

    event("some answers" if answers else "none")
    assert answers == {index: truth[index + 1] for index in answers}


@unhurried
@given(data=st.data(), truth=truths())
def test_complete_reply_gives_everything(data: st.DataObject, truth: dict[int, str]) -> None:
    items = items_of(truth, data.draw(st.booleans()))
    extras = [{"n": n, "text": "extra"} for n in data.draw(st.lists(st.integers(len(truth) + 1), max_size=3))]
    items += data.draw(st.lists(st.sampled_from(items), max_size=3)) + extras

    answers = read_answers(written(data.draw(st.permutations(items))), len(truth))

    assert answers == {n - 1: text for n, text in truth.items()}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["answers", "n", "text"]), inner, max_size=3)
    ),
    max_leaves=15,
)


@unhurried
@given(data=st.data(), value=json_values)
def test_no_reply_is_too_odd_to_read(data: st.DataObject, value: Any) -> None:
    content = json.dumps({"answers": value})
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.text(max_size=5))

    assert all(0 <= index < 3 and isinstance(text, str) for index, text in read_answers(content, 3).items())


# Asking again


@unhurried
@given(count=st.integers(1, 50), chance=st.sampled_from([0, 0.2, 0.8, 1]), random=st.randoms())
def test_asking_for_what_is_missing_ends_with_one_outcome_for_each_task(
    count: int, chance: float, random: Any
) -> None:
    packs, outcomes, asked = [list(range(count))], Counter[int](), Counter[int]()

    while packs:
        pack = packs.pop()
        asked.update(pack)
        said = [{"n": n, "text": "yes"} for n in range(1, len(pack) + 1) if random.random() >= chance]
        answers = read_answers(written(said), len(pack))
        outcomes.update(pack[index] for index in answers)
        missing = [task for index, task in enumerate(pack) if index not in answers]
        size = halves(len(missing))
        if size <= 1:
            outcomes.update(missing)  # singly, where a reply is the answer
        else:
            packs += [missing[start : start + size] for start in range(0, len(missing), size)]

    assert outcomes == Counter(range(count))
    assert max(asked.values()) <= 6


def test_missing_ones_are_halved_down_to_one() -> None:
    assert [halves(missing) for missing in (1, 2, 3, 4, 5, 50)] == [1, 1, 2, 2, 3, 25]


def test_pack_grows_while_full_ones_come_back_whole() -> None:
    size, seen = PackSize(), []

    for _ in range(4):
        seen.append(size.tasks)
        size.came_whole(size.tasks)

    assert seen == [10, 20, 40, 50]


def test_small_pack_shows_nothing_about_larger_ones() -> None:
    size = PackSize()

    size.came_whole(9)

    assert size.tasks == 10


def test_packs_of_one_round_that_fail_halve_once() -> None:
    size = PackSize(40)

    for _ in range(5):
        size.fell_short(40)

    assert size.tasks == 20


def test_packs_of_one_round_that_come_whole_double_once() -> None:
    size = PackSize()

    for _ in range(5):
        size.came_whole(10)

    assert size.tasks == 20


@given(st.lists(st.tuples(st.sampled_from([PackSize.came_whole, PackSize.fell_short]), st.integers(1, 50))))
def test_size_of_packs_stays_in_bounds(steps: list[tuple[Callable[[PackSize, int], None], int]]) -> None:
    size = PackSize()

    for step, tasks in steps:
        step(size, tasks)

        assert 2 <= size.tasks <= 50


# Sharing and estimating


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (0, [], []),
        (0, [1, 2], [0, 0]),
        (10, [1], [10]),
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0, 0], [5, 5]),
        (1, [1, 3], [0, 1]),
        (100, [1, 2, 1], [25, 50, 25]),
    ],
)
def test_total_is_shared_by_weight(total: int, weights: list[int], parts: list[int]) -> None:
    assert share(total, weights) == parts


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_shares_have_exactly_the_sum_and_are_in_proportion(total: int, weights: list[int]) -> None:
    parts = share(total, weights)

    assert sum(parts) == total
    if sum(weights):
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part * sum(weights) - total * weight) < sum(weights)


def test_instructions_are_counted_once_a_pack() -> None:
    job = JobSettings(instructions="a" * 4000)
    alone = estimate_prompt("b" * 400, instructions_tokens=estimate_tokens("a" * 4000))

    estimates = PackTokens(job)

    assert alone == 1104
    assert (estimates.shared, estimates.of_task(alone)) == (1008 + FORM_TOKENS, 108)


@pytest.mark.parametrize(
    ("tasks", "max_chunk_tokens", "packs"),
    [
        (0, 4000, []),
        (1, 4000, [14]),
        (3, 4000, [3]),
        (10, 4000, [10]),
        (11, 4000, [10, 14]),
        (75, 4000, [10, 20, 40, 5]),
        (170, 4000, [10, 20, 40, 50, 50]),
        (25, FORM_TOKENS + 8 + 5 * 18, [5] * 5),
        (3, 1, [14, 14, 14]),
    ],
)
def test_plan_grows_within_the_limit_of_tokens(tasks: int, max_chunk_tokens: int, packs: list[int]) -> None:
    job = JobSettings(pack=True, max_chunk_tokens=max_chunk_tokens)
    shared = FORM_TOKENS + 8

    planned = list(plan([14] * tasks, job))

    assert planned == [14 if pack == 14 else shared + pack * 18 for pack in packs]


def test_task_alone_is_counted_in_its_ordinary_form() -> None:
    job = JobSettings(max_chunk_tokens=10, instructions="a" * 400)

    assert list(plan([500, 600], job)) == [500, 600]
