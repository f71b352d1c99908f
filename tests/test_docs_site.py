"""The built documentation in a browser: nothing is cut off, nothing fails, and everybody can read it."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import AXE, NO_AXE, find_violations, open_browser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = ["", "gpu-tutorial/", "quickstart/", "trainer/", "registry/", "benchmarks/", "notebook-train_and_publish/"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_pages_fit_ask_nobody_else_and_are_accessible(site: str, tmp_path: Path) -> None:
    with open_browser() as browser:
        for page in PAGES:
            for width in (1280, 390):
                for dark in (False, True):
                    browser.open(site + page, width=width, dark=dark)
                    where = f"{page or 'index'}, {width} px, {'dark' if dark else 'light'}"
                    assert browser.run("document.documentElement.scrollWidth") <= width, where
                    scheme = browser.run("document.body.getAttribute('data-md-color-scheme')")
                    assert scheme == ("slate" if dark else "default"), where
                    worst = ("serious", "critical")
                    found = {name: one for name, one in find_violations(browser).items() if one[0] in worst}
                    assert found == {}, where
        assert browser.console == []
        assert [asked for asked in browser.requests if not asked.startswith((site, "data:"))] == []
    if not AXE:
        pytest.skip(NO_AXE)
