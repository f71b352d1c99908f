"""Settings that every test needs: no network, quiet libraries, few threads."""

from __future__ import annotations

import os

import pytest
from tiers import mark_full, pytest_addoption, pytest_runtest_logreport, pytest_sessionfinish

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_logreport", "pytest_sessionfinish"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

#: The files that take longest. They begin first, so that at the end no process waits for one of them.
LONGEST = (
    "test_trainer_engines.py",
    "test_smollm2.py",
    "test_builtin_quantizers_smollm2.py",
    "test_commands_demo.py",
    "test_recipe_train.py",
    "test_builtin_architectures.py",
    "test_trainer_options.py",
    "test_planning.py",
    "test_registry_publishing_processes.py",
    "test_trainer_push_to_hub.py",
    "test_wheel.py",
)


def _find_lacking() -> dict[str, str]:
    """Return the backends whose packages are not installed, with the reason."""
    from lora_plugins.plugins.host import plugin_host
    from lora_plugins.plugins.packages import missing_requirements

    reasons = {one.name: missing_requirements(one.requires) for one in plugin_host().quantizers()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files (the tests of one keep their order), mark the tiers, skip what needs a missing backend."""
    mark_full(items)
    lacking = _find_lacking()
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        for name in {value for value in values if isinstance(value, str)} & set(lacking):
            item.add_marker(pytest.mark.skip(reason=f"{name}: {lacking[name]}"))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
