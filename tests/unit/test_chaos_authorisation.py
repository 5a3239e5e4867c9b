"""The scenario that asks for everything as everybody: what it expects, and that it knows every route."""

import pytest

from chaos.scenarios.authorisation import (
    FORBIDDEN,
    MISSING,
    OK,
    ROUTES,
    UNAUTHENTICATED,
    Kind,
    Status,
    expected,
    undocumented_routes,
)
from chaos.tokens import claims_of, headers_that_do_not_count, token

KEY = b"our own key, of 32 bytes, so so."


def test_every_route_of_the_service_is_in_the_table_and_no_other() -> None:
    assert [row.got for row in undocumented_routes() if not row.ok] == []


@pytest.mark.parametrize(
    ("route", "kind", "auth", "wanted"),
    [
        (("GET", "/healthz"), Kind.BAD, True, OK),
        (("GET", "/jobs"), Kind.NOBODY, True, UNAUTHENTICATED),
        (("GET", "/jobs"), Kind.NOBODY, False, OK),
        (("GET", "/jobs"), Kind.BAD, False, UNAUTHENTICATED),
        (("GET", "/jobs/{id}"), Kind.NOBODY, False, MISSING),
        (("GET", "/jobs/{id}"), Kind.OTHER, True, MISSING),
        (("GET", "/jobs/{id}"), Kind.OWNER, True, OK),
        (("GET", "/jobs/{id}"), Kind.ADMIN, True, OK),
        (("DELETE", "/tokens/{id}"), Kind.ADMIN, True, MISSING),
        (("GET", "/me"), Kind.NOBODY, False, UNAUTHENTICATED),
        (("GET", "/keys"), Kind.OWNER, False, FORBIDDEN),
        (("GET", "/keys"), Kind.ADMIN, True, OK),
        (("POST", "/"), Kind.ADMIN, True, UNAUTHENTICATED),
    ],
)
def test_what_a_caller_may_expect(route: tuple[str, str], kind: Kind, auth: bool, wanted: Status) -> None:
    assert expected(ROUTES[route], kind, auth=auth) == wanted


def test_tokens_that_do_not_count_differ_from_the_good_one() -> None:
    good, other = (token({"sub": name, "jti": name, "exp": 2_000_000_000, "aud": "x"}, KEY) for name in "ab")

    made = headers_that_do_not_count(good, other, KEY)

    assert f"Bearer {good}" not in made.values()
    assert len(set(made.values())) == len(made)
    assert claims_of(made["another audience"].partition(" ")[2])["aud"] == "somebody-else"
