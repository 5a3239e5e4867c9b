"""Fails on a dependency that is unlocked or known to be vulnerable.

Unlocked is found without a network: every requirement is pinned with hashes, names no place to load from, and the
lock satisfies `pyproject.toml`. Vulnerable is asked of an advisory service; where none answers, that is said.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-embedded.txt",
    "requirements-s3.txt",
    "requirements-google-cloud.txt",
    "requirements-azure.txt",
    "requirements-pgsql.txt",
    "requirements-mysql.txt",
    "requirements-mssql.txt",
    "requirements-oracle.txt",
    ".ci/services-requirements.txt",
    ".ci/browser-requirements.txt",
    "bench/requirements-litellm-proxy.txt",
    "bench/requirements-litellm-router.txt",
    "bench/requirements-openai.txt",
    "bench/requirements-plots.txt",
    "chaos/requirements-schemathesis.txt",
)
AUDIT_TIMEOUT_S = 300


def read_lock(name: str) -> tuple[dict[str, Requirement], list[str]]:
    """The pinned requirements of a lock by canonical name, and what is wrong with it."""
    text = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    pinned: dict[str, Requirement] = {}
    faults: list[str] = []
    for line in text.splitlines():
        content = re.sub(r"(^|\s)#.*", "", line).strip()
        if not content:
            continue
        if content.startswith("-") or "://" in content:
            faults.append(f"{name}: an option or an address has no place in a lock: {content[:60]}")
            continue
        specification, *hashes = re.split(r"\s+--hash=", content)
        requirement = Requirement(specification)
        pins = list(requirement.specifier)
        if len(pins) != 1 or pins[0].operator != "==" or "*" in pins[0].version:
            faults.append(f"{name}: {requirement.name} is not pinned with ==")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes):
            faults.append(f"{name}: {requirement.name} has no sha256 hash")
        pinned[canonicalize_name(requirement.name)] = requirement
    return pinned, faults


def find_unmet(asked: list[str], lock: dict[str, Requirement], name: str) -> list[str]:
    """What `pyproject.toml` asks for and the lock does not give."""
    faults: list[str] = []
    for requirement in map(Requirement, asked):
        pinned = lock.get(canonicalize_name(requirement.name))
        if pinned is None:
            faults.append(f"{name}: {requirement.name} is missing; run make lock")
        elif not all(requirement.specifier.contains(pin.version) for pin in pinned.specifier):
            faults.append(
                f"{name}: {requirement.name} is pinned outside {requirement.specifier}; run make lock"
            )
    return faults


def find_unlocked() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    locks: dict[str, dict[str, Requirement]] = {}
    faults: list[str] = []
    for name in LOCKS:
        locks[name], found = read_lock(name)
        faults += found
    runtime, dev = locks["requirements.txt"], locks["requirements-dev.txt"]
    asked = project["project"]["dependencies"]
    faults += find_unmet(asked, runtime, "requirements.txt")
    faults += find_unmet(asked + project["dependency-groups"]["dev"], dev, "requirements-dev.txt")
    for extra, drivers in project["project"]["optional-dependencies"].items():
        name = f"requirements-{extra}.txt"
        faults += find_unmet(asked + drivers, locks[name], name)
        faults += [
            f"{name}: {package} differs from requirements.txt; run make lock"
            for package, requirement in runtime.items()
            if package not in locks[name] or locks[name][package].specifier != requirement.specifier
        ]
    for package, requirement in runtime.items():
        if package not in dev or dev[package].specifier != requirement.specifier:
            faults.append(f"requirements-dev.txt: {package} differs from requirements.txt; run make lock")
    return faults


def find_vulnerable() -> tuple[list[str], list[str]]:
    """Known vulnerabilities, and the packages that no service could tell about."""
    vulnerable: list[str] = []
    unknown: list[str] = []
    for name in LOCKS:
        command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--format", "json"]
        command += ["--progress-spinner", "off", "--requirement", str(ROOT / name)]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S, check=False
            )
            report = json.loads(result.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            unknown.append(f"all of {name}")
            continue
        for package in report["dependencies"]:
            if "skip_reason" in package:
                unknown.append(package["name"])
            vulnerable += [
                f"{package['name']} {package['version']}: {found['id']}" for found in package.get("vulns", [])
            ]
    return sorted(set(vulnerable)), sorted(set(unknown))


def main() -> int:
    unlocked = find_unlocked()
    vulnerable, unknown = find_vulnerable()
    for fault in unlocked + vulnerable:
        print(f"dependencies: {fault}", file=sys.stderr)
    if unknown:
        who = f"{len(unknown)} packages" if len(unknown) > 10 else ", ".join(unknown)
        print(
            f"dependencies: NOT audited, because the advisory service can't be reached or does not know them: {who}"
        )
    print(f"dependencies: {len(unlocked)} unlocked, {len(vulnerable)} vulnerable, {len(unknown)} not audited")
    return 1 if unlocked or vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
