"""Ask the database of known vulnerabilities about the installed packages.

pip-audit says "No known vulnerabilities found" and exits with 0 where it could ask about no package at all, for example
behind a mirror of PyPI without its JSON pages. This program counts what was asked, and fails where nothing was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["main", "summarize"]

_COMMAND = [
    sys.executable,
    "-m",
    "pip_audit",
    "--progress-spinner",
    "off",
    "--skip-editable",
    "--local",
    "--format",
    "json",
]
_SECONDS = 900
_SHOWN = 5


def main() -> int:
    """Print the result; return 0 if no package is known to be vulnerable, 1 if one is, 2 if that cannot be told."""
    try:
        done = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603 - ours
        output, reason = done.stdout, done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        output, reason = "", str(error)
    code, text = summarize(output, reason)
    print(text)
    return code


def summarize(output: str, reason: str) -> tuple[int, str]:
    """Return exit code and text for pip-audit's JSON and its messages."""
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (reason.strip().splitlines() or ["no answer"])[-1][:300]
        return 2, f"NOT AUDITED: the database of vulnerabilities cannot be reached ({last})"
    asked = [package for package in packages if "skip_reason" not in package]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if not asked:
        why = packages[0]["skip_reason"] if packages else "no package is installed"
        return (
            2,
            f"NOT AUDITED: the database of vulnerabilities knows none of {len(packages)} packages here ({why[:200]})",
        )
    more = " …" if len(skipped) > _SHOWN else ""
    told = f"; not known there: {', '.join(skipped[:_SHOWN])}{more} ({len(skipped)})" if skipped else ""
    found = [
        f"{package['name']} {package['version']}: {_list_ids(package)}" for package in asked if package.get("vulns")
    ]
    if found:
        return 1, "\n".join([f"{len(found)} of {len(asked)} packages have known vulnerabilities{told}", *found])
    return 0, f"No known vulnerabilities in {len(asked)} packages{told}"


def _list_ids(package: dict[str, Any]) -> str:
    fixes = sorted({version for vulnerability in package["vulns"] for version in vulnerability.get("fix_versions", ())})
    ids = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
    return f"{ids}, fixed in {', '.join(fixes)}" if fixes else ids


if __name__ == "__main__":
    sys.exit(main())
