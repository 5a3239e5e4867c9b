"""What is remembered of names that callers may make up, and how much of it."""

from concurrent.futures import ThreadPoolExecutor

from gpt_worker.marks import MAX_MARKS, Marks


def test_first_name_is_forgotten_for_one_too_many() -> None:
    marks: Marks[str, int] = Marks(most=2)

    marks["a"], marks["b"] = 1, 2
    marks["a"] = 3
    assert marks == {"a": 3, "b": 2}
    marks["c"] = 4

    assert marks == {"b": 2, "c": 4}


def test_many_threads_may_set_names_at_once() -> None:
    marks: Marks[int, int] = Marks(most=10)

    def fill(first: int) -> None:
        for name in range(first, first + 2000):
            marks[name] = name

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(0, 16_000, 2000)))

    assert len(marks) == 10


def test_more_is_remembered_than_the_jobs_of_one_user_may_name() -> None:
    marks: Marks[str, int] = Marks()

    for number in range(MAX_MARKS + 1000):
        marks[f"model {number}"] = number

    assert len(marks) == MAX_MARKS >= 1000  # MAX_USER_JOBS
