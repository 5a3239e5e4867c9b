"""schemathesis makes requests out of /openapi.json, sound ones and others: every reply must be one that it describes.

An admin, a user, a stranger, and a stranger while `auth` is off ask one after the other; `schemathesis_hooks` sees to
it that no request spoils the run. What a status, a content type and a problem must be is judged here, from the
document; the shapes of good replies, and much else, by schemathesis itself.
"""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environments import ROOT, NotInstalled, make_environment
from chaos import log
from chaos.options import Options
from chaos.report import Row, fact, none_of
from tests.openapi_document import Document
from tests.service import Service
from tests.upstream import Upstream

NAME = "schema"

REQUIREMENTS = ROOT / "chaos" / "requirements-schemathesis.txt"
ENVIRONMENT = ROOT / ".venv-chaos-schemathesis"
HOOKS = ROOT / "chaos" / "schemathesis_hooks.py"
# Of an operation and phase; the coverage phase makes as many as the document asks for.
EXAMPLES, EXAMPLES_SHORT = 40, 2
PHASES, PHASES_SHORT = "examples,coverage,fuzzing,stateful", "examples,fuzzing,stateful"
CASES, CASES_SHORT = 5000, 200
RUN_TIMEOUT_S = 1200.0
REQUEST_TIMEOUT_S = 30
SHOWN_LINES, LINE_LENGTH = 300, 300
# The rest of what schemathesis knows is checked by it: shapes, headers, bad input, methods, what was deleted.
UNCHECKED = (
    "positive_data_acceptance",  # the document can't say all: a template's variables, a file's columns
    "not_a_server_error",  # these two are judged here: some 5xx, and statuses of every route, are documented
    "status_code_conformance",
    "use_after_free",  # DELETE of a job cancels it, and it stays
    "ignored_auth",  # the scenario `authorisation` knows more of it
)
ENV = {"INLINE_WAIT_S": "5", "MAX_USER_JOBS": "0", "MAX_USER_REQUESTS_PER_MINUTE": "0"}
# An event is no text: it takes the schema of a stream for that of each event, as OpenAPI 3.2 has it.
KNOWN = ("ST108",)
UNASKED = {("GET", "/openapi.json")}  # what it was made from
SOUND_5XX = (503, 507)
REFUSED = [400, 401, 403, 404, 405, 409, 413, 414, 415, 422, 429, 431]  # what bad input may be answered with
EVERYWHERE = re.compile(r"an unknown address is a (404), .* a (405) .* is a ([\d, or]+)\.", re.DOTALL)
PROBLEM = "application/problem+json"
PROBLEM_MEMBERS = {"type", "title", "status", "detail", "request_id"}
CALLERS = ("admin", "user", "nobody", "nobody, auth off")
CALLERS_SHORT = ("admin", "nobody, auth off")


@dataclass(frozen=True, slots=True)
class Case:
    """One request of schemathesis', and what came back. Status 0: nothing did."""

    path: str
    method: str
    status: int
    content_type: str
    took_s: float
    body: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}: {self.status} {self.content_type}".rstrip()


def run(options: Options) -> list[Row]:
    try:
        programs = make_environment(ENVIRONMENT, REQUIREMENTS, "--only-binary", ":all:")
    except NotInstalled as error:
        return [Row("schemathesis", "installed", str(error), not os.environ.get("CI"))]
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as name,
        Upstream() as upstream,
        Service(Path(name), ENV, upstream) as service,
    ):
        document = Document(service.get("/openapi.json").json())
        accounts = Accounts(service)
        cases: list[Case] = []
        for caller in CALLERS_SHORT if options.short else CALLERS:
            accounts.set_auth(caller != "nobody, auth off")
            asked, row = _ask(programs / "schemathesis", options, service, accounts, caller, Path(name))
            cases += asked
            rows.append(row)
        rows += judge(cases, document, options.rounds_or(CASES, CASES_SHORT))
        rows.append(none_of("tokens of the run that ended", accounts.ended_tokens()))
        rows.append(none_of("errors in the log", log.faults(service.stderr())))
    return rows


class Accounts:
    """Who asks, and those who take what would spoil the run."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.tokens = {"admin": service.admin}
        for name in ("user", "password", "spare", "other"):
            self.tokens[name] = service.user(f"{name}@example.com")
        self.ids = {name: str(service.get("/me", token).json()["id"]) for name, token in self.tokens.items()}
        self.auth = True

    def set_auth(self, auth: bool) -> None:
        self.auth = auth
        reply = self._service.patch(
            "/settings", self.tokens["admin"], json={"auth": auth, "registration": True}
        )
        reply.raise_for_status()

    def told(self, caller: str) -> dict[str, Any]:
        """What the hooks need to know."""
        return {
            "url": self._service.url,
            "auth": self.auth,
            "token": self.tokens.get(caller),
            "password_token": self.tokens["password"],
            "spare_token": self.tokens["spare"],
            "admin_token": self.tokens["admin"],
            "kept_users": [it for name, it in self.ids.items() if name != "other"],
            "other_user": self.ids["other"],
        }

    def ended_tokens(self) -> list[str]:
        """Those that must have outlived the run and have not."""
        kept = [name for name in self.tokens if name != "other"]
        return [name for name in kept if self._service.get("/me", self.tokens[name]).status_code != 200]


def _ask(
    program: Path, options: Options, service: Service, accounts: Accounts, caller: str, folder: Path
) -> tuple[list[Case], Row]:
    """schemathesis' cases for one caller, and a row of what it found itself."""
    record = folder / f"{caller}.jsonl"
    record.touch()
    for_hooks = {**accounts.told(caller), "log": str(record)}
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (home / "schemathesis.toml").write_text(
        f"[checks.negative_data_rejection]\nexpected-statuses = {REFUSED}\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "COLUMNS": "120",
        "CHAOS_SCHEMA": json.dumps(for_hooks),
        "SCHEMATHESIS_HOOKS": str(HOOKS),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        *(str(program), "run", f"{service.url}/openapi.json"),
        *("--phases", PHASES_SHORT if options.short else PHASES),
        *("--max-examples", str(EXAMPLES_SHORT if options.short else EXAMPLES)),
        *("--exclude-checks", ",".join(UNCHECKED), "--continue-on-failure"),
        *("--request-timeout", str(REQUEST_TIMEOUT_S), "--seed", str(options.seed), "--workers", "2"),
        *("--warnings", "off"),
    ]
    done = subprocess.run(
        command,
        env=env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    cases = [Case(**json.loads(line)) for line in record.read_text("utf-8").splitlines()]
    told = re.findall(r"^  ❌ (ST\d+ .*|.*errors?: \d+.*)$", done.stdout, re.MULTILINE)
    found = [it for it in told if not it.startswith(KNOWN)]
    if done.returncode and not told:
        found = [f"exit status {done.returncode}"]
    if found:
        lines = [line[:LINE_LENGTH] for line in (done.stdout + done.stderr).splitlines()]
        print("\n".join(lines[-SHOWN_LINES:]))
    return cases, none_of(f"{caller}: what schemathesis found", found, len(cases))


# What the cases are judged by


def judge(cases: Sequence[Case], document: Document, wanted: int) -> list[Row]:
    """The rows of everybody's cases together."""
    everywhere = statuses_everywhere(document)
    reached = {(case.method, case.path) for case in cases if case.status < 400}
    operations = {(method, path) for method, path, _ in document.operations()}
    slowest = max(cases, key=lambda case: case.took_s, default=None)
    statuses = Counter(case.status for case in cases)
    return [
        Row("cases", f"≥ {wanted}", str(len(cases)), len(cases) >= wanted),
        none_of("no reply", [str(case) for case in cases if not case.status], len(cases)),
        none_of("5xx but 503 and 507", [str(case) for case in cases if is_server_error(case)], len(cases)),
        none_of("undocumented", list(undocumented(cases, document, everywhere)), len(cases)),
        none_of("errors that are no problem", list(no_problems(cases)), len(cases)),
        none_of(
            "operations without a case",
            [
                f"{method} {path}"
                for method, path in sorted(
                    operations - UNASKED - {(case.method, case.path) for case in cases}
                )
            ],
            len(operations),
        ),
        fact("operations that were done at least once", f"{len(reached & operations)} of {len(operations)}"),
        fact("statuses", ", ".join(f"{status} × {count}" for status, count in sorted(statuses.items()))),
        fact("slowest", f"{slowest.took_s:.2f} s, {slowest}" if slowest else "–"),
    ]


def statuses_everywhere(document: Document) -> set[int]:
    """Those that the description names for any request, whatever its route."""
    found = EVERYWHERE.search(document.document["info"]["description"])
    assert found is not None, "the description no longer tells the statuses of every route"
    return {int(status) for status in re.findall(r"\d{3}", " ".join(found.groups()))}


def is_server_error(case: Case) -> bool:
    return case.status >= 500 and case.status not in SOUND_5XX


def undocumented(cases: Sequence[Case], document: Document, everywhere: set[int]) -> Iterator[str]:
    """Statuses, and content types, of which the document knows nothing."""
    for case in cases:
        operation = document.document["paths"].get(case.path, {}).get(case.method.lower())
        responses = document.responses(operation) if operation is not None else {}
        response = responses.get(case.status)
        if response is None:
            if case.status not in everywhere:
                yield str(case)
            continue
        content = response.get("content", {})
        if content and case.content_type.partition(";")[0] not in content:
            yield str(case)


def no_problems(cases: Sequence[Case]) -> Iterator[str]:
    """Errors whose bodies are no RFC 9457 problem; a HEAD has none."""
    for case in cases:
        if case.status < 400 or case.method == "HEAD":
            continue
        try:
            problem = json.loads(case.body)
        except ValueError:
            problem = None
        if (
            case.content_type != PROBLEM
            or not isinstance(problem, dict)
            or not problem.keys() >= PROBLEM_MEMBERS
            or problem["status"] != case.status
        ):
            yield str(case)
