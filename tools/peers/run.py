"""Run peers' own tests with `prepare_model` in place of `get_peft_model`, and those that fail as they are.

``python tools/peers/run.py`` takes PEFT's tests from the folder ``PEFT_SOURCE``, or else from the source release of the
installed version, and TRL's from the folder ``TRL_SOURCE`` (its releases hold no tests). Their Hub is one on loopback
with random models. The exit code is 1 if a test differs that ``docs/peers.md`` does not list, or lists for nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from peers.differences import Comparison, choose_suspects, compare, read_listed  # noqa: E402
from peers.models import fill_hub  # noqa: E402

from registry.testing import LoopbackHub  # noqa: E402

PAGE = ROOT / "docs" / "peers.md"
WORK = ROOT / "build" / "peers"
#: Seconds that one test may take.
LIMIT = 180


@dataclass(frozen=True)
class Suite:
    """A peer's tests: whose they are, and the files that concern LoRA and run on a CPU."""

    name: str
    files: Sequence[str]
    #: Further arguments for pytest.
    arguments: Sequence[str] = ()
    #: Whether the source release holds the tests.
    released: bool = True


PEFT = Suite(
    "peft",
    (
        "test_bdlora",
        "test_custom_models",
        "test_decoder_models",
        "test_encoder_decoder_models",
        "test_feature_extraction_models",
        "test_initialization",
        "test_lora_ga",
        "test_lora_intruders",
        "test_lora_variants",
        "test_lorafa",
        "test_loraplus",
        "test_other",
        "test_seq_classifier",
        "test_target_parameters",
        "test_token_classification_qa",
        "test_trainable_tokens",
        "test_velora",
    ),
)

TRL = Suite(
    "trl",
    (
        "test_dpo_trainer",
        "test_grpo_trainer",
        "test_kto_trainer",
        "test_reward_trainer",
        "test_rloo_trainer",
        "test_sft_trainer",
    ),
    ("-k", "peft or lora"),
    released=False,
)


def find_source(suite: Suite) -> Path | None:
    """Return the folder that holds the suite's ``tests``; `None` if they are in no release and none was given."""
    given = os.environ.get(f"{suite.name.upper()}_SOURCE")
    if given:
        return Path(given)
    if not suite.released:
        return None
    version = importlib.metadata.version(suite.name)
    archive = WORK / f"{suite.name}-{version}.tar.gz"
    if not archive.is_file():
        download = ["pip", "download", "-q", "--no-binary", suite.name, "--no-deps"]
        subprocess.run([sys.executable, "-m", *download, "-d", str(WORK), f"{suite.name}=={version}"], check=True)  # noqa: S603 - arguments of our own
    with tarfile.open(archive) as opened:
        opened.extractall(WORK / "sources", filter="data")
    return WORK / "sources" / f"{suite.name}-{version}"


def lay_out(suite: Suite, source: Path) -> Path:
    """Copy the tests into a package of their own, without the settings of the repository around them."""
    folder = WORK / suite.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "tests", folder / "tests")
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return folder


def run_tests(suite: Suite, folder: Path, endpoint: str, workers: int, *more: str) -> dict[str, dict[str, Any]]:
    """Run the suite's files with the plugin, and return id -> outcome, error and calls."""
    results = folder / ("exchanged.json" if "--exchange" in more else "baseline.json")
    results.unlink(missing_ok=True)
    command = ["pytest", "-q", "--tb=line", "-p", "peers.exchange", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command += ["-W", "ignore", "--timeout", str(LIMIT), "--results", str(results)]
    command += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    files = [f"tests/{name}.py" for name in suite.files if (folder / "tests" / f"{name}.py").is_file()]
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **hub, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        arguments = [sys.executable, "-m", *command, *suite.arguments, *more, *files]
        subprocess.run(arguments, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)  # noqa: S603 - as above
    if not results.is_file():
        raise SystemExit(f"The tests of {suite.name} did not run; see {folder / 'output.txt'}.")
    read: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    return read


def _count(tests: Mapping[str, Mapping[str, Any]], key: str, value: Any) -> int:
    return sum(test.get(key) == value for test in tests.values())


def print_figures(name: str, exchanged: Mapping[str, Any], found: Comparison) -> None:
    """Print what was run, how often the function was exchanged, and every difference."""
    outcomes = ", ".join(f"{_count(exchanged, 'outcome', kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    calls = sum(test.get("exchanged", 0) for test in exchanged.values())
    print(f"{name} with prepare_model: {len(exchanged)} tests, {outcomes}; {calls} calls exchanged")
    print(f"{found.same} tests that call it pass, {found.failing} fail as they are too,")
    print(f"{len(found.listed)} differ as listed, {len(found.unlisted)} differ unlisted")
    for test, error in found.unlisted.items():
        print(f"UNLISTED {test}\n    {' '.join(error.split())[:300]}")
    for pattern in found.stale:
        print(f"LISTED, but the same: {pattern}")


def run_suite(suite: Suite, workers: int, listed: Sequence[str]) -> bool:
    """Run one suite, and its failing tests once more without us; returns whether it differs just as the page says."""
    source = find_source(suite)
    if source is None:
        variable = f"{suite.name.upper()}_SOURCE"
        print(f"SKIPPED: {suite.name}'s tests are in no release; set {variable} to a checkout of its repository.")
        return True
    folder = lay_out(suite, source)
    with LoopbackHub(orgs=()) as hub:
        fill_hub(hub)
        start = time.monotonic()
        exchanged = run_tests(suite, folder, hub.endpoint, workers, "--exchange")
        if not any(test.get("exchanged") for test in exchanged.values()):
            raise SystemExit(f"No call of {suite.name}'s tests was exchanged.")
        only = folder / "only.json"
        suspects = choose_suspects(exchanged)
        only.write_text(json.dumps(suspects), encoding="utf-8")
        baseline = run_tests(suite, folder, hub.endpoint, workers, "--only", str(only)) if suspects else {}
    found = compare(exchanged, baseline, listed)
    print_figures(suite.name, exchanged, found)
    print(f"{(time.monotonic() - start) / 60:.0f} minutes", flush=True)
    return found.agrees


def main() -> int:
    """Run every suite; the exit code says whether all differ as the page lists."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", nargs="*", help="Names of test files, such as test_initialization; default: all.")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    listed = read_listed(PAGE.read_text(encoding="utf-8"))
    suites = [PEFT, TRL]
    if options.files:
        suites = [replace(suite, files=options.files) for suite in suites]
    agreed = [run_suite(suite, options.workers, listed) for suite in suites]
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
