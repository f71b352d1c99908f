"""Settings that every test needs: no network, quiet libraries, few threads."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiers import mark_full, pytest_addoption, pytest_runtest_logreport, pytest_sessionfinish

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_runtest_logreport",
    "pytest_runtest_protocol",
    "pytest_sessionfinish",
]

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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    """Give loggers their levels back after each test, the fixtures of its module included."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(logger, logger.level) for logger in (logging.root, *loggers)]
    try:
        return (yield)
    finally:
        for logger, level in before:
            if logger.level != level:
                logger.setLevel(level)


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """wandb as it is in a new process, writing below `tmp_path`.

    What wandb read of the environment at its first run holds for the whole process, until `teardown`: without it, a
    second test would write into the folder of the first one.
    """
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "adapters")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    yield wandb
    wandb.teardown()


@pytest.fixture
def local_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """mlflow with a store in a folder below `tmp_path`, and no run or address left behind."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "adapters")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # Which of the experiments it is, in this store: transformers writes it down for the whole process.
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    monkeypatch.chdir(tmp_path)
    yield mlflow
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3 server on loopback; the tests of it are skipped where moto is not installed."""
    pytest.importorskip("moto", reason="moto is not installed: pip install 'lora-plugins[s3-server]'")
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'lora-plugins[s3]'")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def answer(environ: Any, start_response: Any) -> list[bytes]:
        # moto 5.2.5 compares and writes in two steps, between which others write; S3 does both in one.
        with lock:
            return list(app(environ, start_response))

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty prefix in a bucket, with the AWS variables for it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "loopback")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-loopback-store")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    request = urllib.request.Request(f"{s3_server}/adapters", method="PUT")
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request):
        pass
    return f"s3://adapters/{secrets.token_hex(8)}"
