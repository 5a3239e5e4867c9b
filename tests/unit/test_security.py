"""SECURITY.md names a test for what it claims: each is there."""

import re

from tests.documents import ROOT, read, read_links


def test_every_test_that_security_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", read("SECURITY.md")))
    there = {
        name
        for path in ROOT.glob("tests/*/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }

    assert len(named) > 30
    assert named - there == set()


def test_both_readmes_lead_to_it() -> None:
    assert all("SECURITY.md" in read_links(name) for name in ("README.md", "README.uk.md"))
