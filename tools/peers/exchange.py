"""A pytest plugin that calls `prepare_model` where peers' tests, or TRL, call PEFT.

Without ``--exchange`` it only counts the calls of `peft.get_peft_model` with a LoRA configuration; with it they go to
`lora_plugins.prepare_model`. Tests of other methods are deselected, and data sets come from `peers.data`.
"""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

import functools
import gc
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from peers.data import load_local

import lora_plugins

#: Counted calls and exchanged calls of the running test.
CALLS = {"lora": 0, "exchanged": 0}
BEFORE = pytest.StashKey[dict[str, int]]()
#: Whose calls are exchanged.
CALLERS = ("tests.", "trl.")
ORIGINAL = peft.get_peft_model
#: Arguments that `prepare_model` has no equivalent for: such calls stay PEFT's.
PEFT_ONLY = ("mixed", "revision", "low_cpu_mem_usage")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add this plugin's options."""
    group = parser.getgroup("peers")
    group.addoption("--exchange", action="store_true", help="call prepare_model in place of get_peft_model")
    group.addoption("--only", type=Path, help="JSON file with the ids of the tests to run")
    group.addoption("--results", type=Path, help="JSON file to write: id -> outcome, error, calls")


def _draw_seed() -> int:
    """Return a seed from the caller's random state, which decides PEFT's initial values."""
    return int(torch.randint(2**31, ()))


def _exchange(model: Any, peft_config: peft.LoraConfig, **arguments: Any) -> Any:
    CALLS["exchanged"] += 1
    # Without PEFT's cast to float32 its adapters have the base's dtype.
    dtype = torch.float32 if arguments.get("autocast_adapter_dtype", True) else next(model.parameters()).dtype
    name = arguments.get("adapter_name", "default")
    return lora_plugins.prepare_model(
        model, peft_config=peft_config, adapter_name=name, trainable_dtype=dtype, seed=_draw_seed()
    )


def _make_counter(exchanging: bool) -> Callable[..., Any]:
    signature = inspect.signature(ORIGINAL)

    @functools.wraps(ORIGINAL)
    def count(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        if type(arguments["peft_config"]) is not peft.LoraConfig or any(arguments.get(name) for name in PEFT_ONLY):
            return ORIGINAL(*args, **kwargs)
        CALLS["lora"] += 1
        return _exchange(**arguments) if exchanging else ORIGINAL(*args, **kwargs)

    return count


def _uses_another_method(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for value in parameters.values():
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, peft.PeftConfig) and kind is not peft.LoraConfig:
            return True
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the counting function into the modules of the tests, and deselect what is not asked for."""
    counter = _make_counter(config.getoption("exchange"))
    for module in list(sys.modules.values()):
        if module.__name__.startswith("tests.") and vars(module).get("load_dataset") is datasets.load_dataset:
            module.load_dataset = load_local  # type: ignore[attr-defined]
        if module.__name__.startswith(CALLERS) and vars(module).get("get_peft_model") is ORIGINAL:
            module.get_peft_model = counter  # type: ignore[attr-defined]
    only = config.getoption("only")
    wanted = set(json.loads(only.read_text(encoding="utf-8"))) if only else None
    chosen = [item for item in items if not _uses_another_method(item) and (wanted is None or item.nodeid in wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
    # Many of PEFT's tests collect garbage; what was imported never is any.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the number of calls before the test's fixtures, which make models too."""
    item.stash[BEFORE] = dict(CALLS)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Send the number of calls along with the test's report, which crosses processes."""
    yield
    item.user_properties.extend((name, CALLS[name] - item.stash[BEFORE][name]) for name in CALLS)


class Results:
    """The outcome of every test: the worst of its three phases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep one phase's outcome."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "error": ""})
        if report.outcome != "passed" and test["outcome"] == "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            test.update(outcome=report.outcome, error=crash.message if crash else str(report.longrepr)[-600:])
        test.update(report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file, in the process that has every report."""
        if not hasattr(session.config, "workerinput"):
            self.path.write_text(json.dumps(self.tests, indent=1), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Collect results if asked to, and let TRL's arguments, which are made later, train on a machine without GPU."""
    if not torch.cuda.is_available():
        transformers.TrainingArguments.__dataclass_fields__["use_cpu"].default = True
    path = config.getoption("results")
    if path:
        config.pluginmanager.register(Results(path), "peers-results")
