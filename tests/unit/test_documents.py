"""The documents: both READMEs say the same, every link leads somewhere, and nothing of the service is left out."""

import re
import tomllib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from flask import Flask

from gpt_worker import api
from gpt_worker.api.access import POLICIES
from gpt_worker.api.job_schemas import JobSettingsBody
from gpt_worker.domain import ErrorCode
from tests.documents import ROOT, Block, read, read_blocks, read_headings, read_links

READMES = ("README.md", "README.uk.md")
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
EXAMPLES = ("sentiment.json", "receiver.py", "receiver.mjs", "backend.py", "nginx.conf", "gpt-worker.service")
FOR_PROGRAMS = {"/docs/<>"}  # routes that nobody types: what the docs page is made of
COMMENT = re.compile(r"^\s*(#|//).*\n", re.MULTILINE)


def test_the_readmes_have_the_same_code_blocks() -> None:
    english, ukrainian = ([without_comments(block) for block in read_blocks(name)] for name in READMES)

    assert english == ukrainian


def without_comments(block: Block) -> tuple[str, str]:
    return block.language, COMMENT.sub("", block.text)


def test_the_readmes_have_the_same_headings_with_the_same_number_of_blocks() -> None:
    english, ukrainian = (shape(name) for name in READMES)

    assert english == ukrainian


def shape(name: str) -> list[tuple[int, int]]:
    sections = [block.section for block in read_blocks(name)]
    return [(heading.level, sections.count(heading.text)) for heading in read_headings(name)]


def test_the_readmes_have_the_same_tables() -> None:
    english, ukrainian = ([keys_of_table(line) for line in rows(name)] for name in READMES)

    assert english == ukrainian


def rows(name: str) -> list[str]:
    return [line for line in read(name).splitlines() if line.startswith("| `")]


def keys_of_table(row: str) -> list[str]:
    """The code in the first cell: a setting, a route, an error code, a file."""
    return re.findall(r"`([^`]+)`", row.replace(r"\|", "/").split("|")[1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_in_the_tree_leads_somewhere(name: str) -> None:
    for link in read_links(name):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / (path or name)).exists(), link
        if anchor:
            assert anchor in {heading.anchor for heading in read_headings(path or name)}, link


def test_the_contents_name_every_section_that_follows() -> None:
    for name in READMES:
        headings = [heading for heading in read_headings(name) if heading.level > 1][1:]
        in_contents = {link.removeprefix("#") for link in read_links(name) if link.startswith("#")}

        assert {heading.anchor for heading in headings} == in_contents


def test_each_readme_leads_to_the_other_at_its_top() -> None:
    english, ukrainian = (read_links(name)[0] for name in READMES)

    assert (english, ukrainian) == ("README.uk.md", "README.md")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_in_the_readme_as_it_is_in_its_file(name: str) -> None:
    text = read(f"examples/{name}")

    assert text in {block.text for block in read_blocks("README.md")}
    assert f"examples/{name}" in read_links("README.md")


@pytest.mark.parametrize("name", READMES)
def test_every_setting_has_a_row_with_its_default(name: str) -> None:
    table = [line for line in read(name).splitlines() if line.startswith("| `")]
    settings = re.findall(r"^([A-Z][A-Z_0-9]*)=(.*)$", read(".env.example"), re.MULTILINE)

    assert len(settings) > 20
    for setting, default in settings:
        row = next((line for line in table if f"`{setting}`" in line), "")
        assert row, setting
        if setting not in ("REQUEST_API", "GPT_BASE_URL_0"):
            assert default in row, f"{setting}={default}: {row}"


@pytest.mark.parametrize("name", READMES)
def test_every_setting_of_a_job_has_a_row(name: str) -> None:
    keys = {key for row in rows(name) for key in keys_of_table(row)}

    assert set(JobSettingsBody.model_fields) <= keys


@pytest.mark.parametrize("name", READMES)
def test_every_error_code_of_a_task_has_a_row(name: str) -> None:
    keys = {key for row in rows(name) for key in keys_of_table(row)}

    assert {str(code) for code in ErrorCode} <= keys


@pytest.mark.parametrize("name", READMES)
def test_every_route_is_in_the_readme(name: str) -> None:
    text = read(name)
    written = {anonymous(found) for found in re.findall(r"`((?:GET|POST|PATCH|DELETE) /[^`?]*)", text)}

    assert routes() - written == set()
    assert written - routes() == set()


def routes() -> set[str]:
    app = api.make_app("0")
    api.register(app)
    return {
        f"{method} {path}"
        for endpoint in POLICIES
        for rule in rules(app, endpoint)
        for method in (rule[0] or set()) - {"HEAD", "OPTIONS"}
        if (path := anonymous(rule[1])) not in FOR_PROGRAMS
    }


def rules(app: Flask, endpoint: str) -> Iterable[tuple[set[str] | None, str]]:
    return [(rule.methods, rule.rule) for rule in app.url_map.iter_rules(endpoint)]


def anonymous(route: str) -> str:
    return re.sub(r"<[^>]*>", "<>", route)


@pytest.mark.parametrize("name", READMES)
def test_every_dependency_has_its_reason(name: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    section = read(name).split("\n## ")[-2]

    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        package = re.match(r"[\w.-]+", requirement)
        assert package
        assert re.search(rf"^\| (.*, )?{package[0]}(, .*)? \|", section, re.MULTILINE), requirement


@pytest.mark.parametrize("name", READMES)
def test_every_module_has_its_place_in_the_architecture(name: str) -> None:
    named = {Path(key).name for row in rows(name) for key in keys_of_table(row)}
    package = ROOT / "gpt_worker"
    modules = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}

    assert modules | packages <= named


@pytest.mark.parametrize("name", READMES)
def test_every_file_in_the_architecture_is_there(name: str) -> None:
    for row in rows(name):
        for key in keys_of_table(row):
            if re.fullmatch(r"[\w./]+(\.py|/)", key):
                assert (ROOT / key).exists() or (ROOT / "gpt_worker" / key).exists(), key


def test_the_picture_of_the_architecture_shows_parts_that_exist() -> None:
    (picture,) = (block for block in read_blocks("README.md") if block.language == "text")
    parts = {"api", "jobs", "recorder", "deliveries", "dispatcher", "lanes", "gpt"}

    assert parts <= set(re.findall(r"[a-z]+", picture.text))
    for part in parts:
        assert (ROOT / "gpt_worker" / part).is_dir() or (ROOT / "gpt_worker" / f"{part}.py").is_file(), part


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_line_of_prose_is_too_long_to_read_beside_its_change(name: str) -> None:
    for line in read(name).splitlines():
        assert line.startswith("|") or len(line) <= 128, line
