"""The judgement of webhooks: what is owed by the database's outbox against what the receiver got."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from chaos.ledger import BYTES, WEBHOOKS, Ledger, Submit, expected
from chaos.snapshot import Snapshot

ENDS = ("succeeded", "partial", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Hook:
    """One webhook as it came, its signature checked."""

    id: str
    body: bytes
    verified: bool
    taken: bool
    """Whether the receiver said 2xx."""


def note(ledger: Ledger, bodies: Iterable[bytes]) -> None:
    """What the receiver was told in a life must stand at its end."""
    for body in bodies:
        message = json.loads(body)
        submit = ledger.submits.get(message["data"].get("metadata", {}).get("mark", ""))
        if submit is not None:
            submit.told_run = max(submit.told_run, message["data"]["run"])
            submit.shown |= {
                name for name, answer in (message["data"]["results"] or {}).items() if answer is not None
            }


def check(ledger: Ledger, now: Snapshot, hooks: list[Hook]) -> None:
    """When all has come to rest: breaches and counts go to the ledger."""
    bodies: dict[str, set[bytes]] = {}
    for hook in hooks:
        bodies.setdefault(hook.id, set()).add(hook.body)
        if not hook.verified:
            ledger.breach(BYTES, f"{hook.id}: the signature does not hold")
    for id_, different in bodies.items():
        if len(different) > 1:
            ledger.breach(BYTES, f"{id_} came with {len(different)} bodies")
        _check_body(ledger, id_, json.loads(next(iter(different))), now)
    _check_owed(ledger, now, taken={hook.id for hook in hooks if hook.taken})
    ledger.counts["webhooks"] = len(bodies)
    ledger.counts["webhooks that came again"] = len(hooks) - len(bodies)


def _check_owed(ledger: Ledger, now: Snapshot, taken: set[str]) -> None:
    runs: Counter[tuple[str, int]] = Counter()
    for delivery in now.deliveries.values():
        if delivery.job_id is not None:
            if delivery.job_id not in now.jobs:
                continue  # purged: what was not delivered is given up
            runs[delivery.job_id, delivery.run] += 1
        if delivery.status != "delivered" or delivery.id not in taken:
            told = "it came" if delivery.id in taken else "it never came"
            ledger.breach(WEBHOOKS, f"{delivery.id} of {delivery.job_id} is {delivery.status}, {told}")
    for run, times in runs.items():
        if times > 1:
            ledger.breach(WEBHOOKS, f"{run} has {times} deliveries")
    for job in now.jobs.values():
        if job.webhook and job.finished and not runs[job.id, job.run]:
            ledger.breach(WEBHOOKS, f"{job.mark} run {job.run} has no delivery")
    for id_ in ledger.tests_owed - taken:
        ledger.breach(WEBHOOKS, f"the test {id_} never came")


def _check_body(ledger: Ledger, id_: str, message: dict[str, Any], now: Snapshot) -> None:
    if message["type"] != "job.finished":
        return
    told = message["data"]
    submit = ledger.submits.get(told["metadata"].get("mark", ""))
    if submit is None:
        ledger.breach(BYTES, f"{id_} is about {told['id']}, which nobody submitted")
        return
    for fault in _faults(submit, told):
        ledger.breach(BYTES, f"{id_} of {submit.mark}: {fault}")
    job = now.jobs.get(told["id"])
    if job is not None and job.run == told["run"] and job.answered != told["counts"]["answered"]:
        ledger.breach(BYTES, f"{id_} of {submit.mark}: {told['counts']}, stored {job.answered} answers")


def _faults(submit: Submit, told: dict[str, Any]) -> list[str]:
    if told["results"] is None:
        return ["there are no results"]
    if list(told["results"]) != list(submit.texts):
        return ["other ids, or in another order"]
    faults = [] if told["status"] in ENDS else [f"it is told as {told['status']}"]
    for name, answer in told["results"].items():
        is_right = name in told["errors"] if answer is None else answer == expected(submit.texts[name])
        if not is_right:
            faults.append(f"{name} is {answer!r}")
    return faults
