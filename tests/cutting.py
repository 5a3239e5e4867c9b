"""A change of the tables that is cut short, as by a kill."""

from collections.abc import Callable

from sqlalchemy import Engine, event


class Cut(Exception):
    """The service was killed."""


def is_cut(change: Callable[[], None], after: int) -> bool:
    """Whether the change had so many statements that make, change or drop something; it is cut after that one."""
    left = after

    def after_cursor_execute(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        nonlocal left
        left -= statement.lstrip().startswith(("CREATE ", "ALTER ", "DROP "))
        if not left:
            raise Cut

    event.listen(Engine, "after_cursor_execute", after_cursor_execute)
    try:
        change()
    except Cut:
        return True
    finally:
        event.remove(Engine, "after_cursor_execute", after_cursor_execute)
    return False
