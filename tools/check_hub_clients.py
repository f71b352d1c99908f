"""Check the loopback Hub against clients that others wrote: several huggingface_hub, the npm client and a proxy.

    python tools/check_hub_clients.py [--cache FOLDER] [--only NAME]

Each client is installed once, into an environment of its own below the cache folder, with pip or npm. Prints a table
and exits with 1 if any call of any client failed; with 77 if no client could be installed (no package index, say).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.testing import LoopbackHub

TOOLS = Path(__file__).resolve().parent
NOTHING_INSTALLED = 77
WEIGHTS = bytes(range(256)) * 1000
CARD = b"---\nlibrary_name: peft\nbase_model: org/base\n---\n# An adapter\n"


class NotInstallable(Exception):
    """A client that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Client:
    """One client: its name in the table, what to install, and how to run the probe."""

    name: str
    requirement: str
    probe: Callable[[Path, str], list[dict[str, object]]]


def stock_client(cache: Path, requirement: str) -> list[dict[str, object]]:
    """The calls of ``hub_probe.py`` with this huggingface_hub."""
    python = _environment(cache, requirement)
    with LoopbackHub() as hub:
        stranger = hub.add_user("stranger")
        rows = _run([python, str(TOOLS / "hub_probe.py"), hub.endpoint, hub.token, stranger.token, "hub"], hub.endpoint)
        return rows + _leaks(hub)


def npm_client(cache: Path, requirement: str) -> list[dict[str, object]]:
    """The calls of ``hub_probe.mjs``."""
    folder = cache / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "@huggingface" / "hub").exists():
        _install(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), requirement])
    with LoopbackHub() as hub:
        rows = _run(["node", str(TOOLS / "hub_probe.mjs"), hub.endpoint, hub.token], hub.endpoint, folder)
        return rows + _leaks(hub)


def proxy(cache: Path, requirement: str) -> list[dict[str, object]]:
    """Downloads by the client of this environment through ``olah``, which knows the Hub as the source of its mirror."""
    python = _environment(cache, requirement)
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as folder:
        hub.create_repo("org/ready")
        hub.move_tag(
            "org/ready", "v1", hub.commit("org/ready", {"README.md": CARD, "adapter_model.safetensors": WEIGHTS})
        )
        with _olah(str(Path(python).parent / "olah-cli"), hub, folder) as endpoint:
            return _run([sys.executable, str(TOOLS / "hub_probe.py"), endpoint, hub.token, "", "proxy"], endpoint)


CLIENTS = [
    Client("huggingface_hub 0.36.2", "huggingface_hub==0.36.2", stock_client),
    Client("huggingface_hub 1.0.1", "huggingface_hub==1.0.1", stock_client),
    Client("huggingface_hub 1.33.0", "huggingface_hub==1.33.0", stock_client),
    Client("huggingface_hub 2.4.0", "huggingface_hub==2.4.0", stock_client),
    Client("@huggingface/hub 2.17.5", "@huggingface/hub@2.17.5", npm_client),
    Client("olah 0.5.4 in front", "olah==0.5.4", proxy),
]


@contextmanager
def _olah(program: str, hub: LoopbackHub, folder: str) -> Iterator[str]:
    here = f"127.0.0.1:{_free_port()}"
    command = [program, "--host", "127.0.0.1", "--port", here.partition(":")[2], "--hf-scheme", "http"]
    command += [
        "--hf-netloc",
        hub.endpoint.partition("//")[2],
        "--hf-lfs-netloc",
        hub.storage_origin.partition("//")[2],
    ]
    command += ["--mirror-scheme", "http", "--mirror-netloc", here, "--mirror-lfs-netloc", here]
    command += ["--repos-path", f"{folder}/repos", "--log-path", f"{folder}/logs"]
    with open(f"{folder}/out", "w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - a developer's tool
    try:
        _await_port(here, process)
        yield f"http://{here}"
    finally:
        process.terminate()
        process.wait()


def _environment(cache: Path, requirement: str) -> str:
    folder = cache / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        _install([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
        (folder / "complete").touch()
    return str(python)


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)  # noqa: S603 - a developer's tool
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstallable(f"{command[0]}: {error}") from None
    if done.returncode:
        raise NotInstallable((done.stderr.strip().splitlines() or ["no reason given"])[-1])


def _run(command: list[str], endpoint: str, folder: Path | None = None) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as home:
        # huggingface_hub 0.36 and 1.0 cannot parse the address of a commit at an endpoint that is not HF_ENDPOINT.
        settings = {
            "HF_HOME": home,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(  # noqa: S603 - a developer's tool
            command, capture_output=True, text=True, env={**os.environ, **settings}, cwd=folder, timeout=300
        )
    rows: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        rows.append({"call": "the probe itself", "ok": False, "error": f"exit {done.returncode}: {reason}"})
    return rows


def _leaks(hub: LoopbackHub) -> list[dict[str, object]]:
    leaks = len(hub.leaks())
    return [{"call": "no token to the storage origin", "ok": not leaks, "error": f"{leaks} requests carried one"}]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    for _ in range(150):
        if process.poll() is not None:
            raise NotInstallable(f"the proxy stopped with exit code {process.returncode}")
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise NotInstallable("the proxy did not start within 30 seconds")


def check(client: Client, cache: Path) -> tuple[str, bool | None]:
    """Probe one client: its row of the table, and whether all calls passed (``None``: it cannot be installed)."""
    try:
        rows = client.probe(cache, client.requirement)
    except NotInstallable as reason:
        return f"{client.name:<26} not installed: {reason}", None
    failed = [row for row in rows if not row["ok"]]
    line = f"{client.name:<26} {len(rows) - len(failed):>3} of {len(rows)} calls"
    for row in failed:
        line += f"\n    {row['call']}: {row.get('error')}"
    return line, not failed and bool(rows)


def main() -> int:
    """Check all clients, or those whose name contains ``--only``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-plugins" / "hub-clients"
    parser.add_argument("--cache", type=Path, default=default, help=f"where the clients are kept (default: {default})")
    parser.add_argument("--only", default="", help="check the clients whose name contains this")
    options = parser.parse_args()
    outcomes = []
    for client in CLIENTS:
        if options.only in client.name:
            line, outcome = check(client, options.cache)
            print(line, flush=True)
            outcomes.append(outcome)
    if False in outcomes:
        return 1
    return 0 if True in outcomes else NOTHING_INSTALLED


if __name__ == "__main__":
    sys.exit(main())
