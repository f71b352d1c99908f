"""Headless Chromium for tests of pages, driven over a pipe; nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

#: axe-core's script, with which accessibility is checked.
AXE = os.environ.get("AXE_CORE")
NO_AXE = "NO AXE: npm install axe-core, and set AXE_CORE to its axe.min.js; accessibility was not checked"


def find_violations(browser: Browser) -> dict[str, Any]:
    """Return what axe finds on the page; nothing without axe, in which case the test ends as skipped."""
    if not AXE:
        return {}
    browser.run(Path(AXE).read_text() + "; 0")
    found = browser.run("axe.run().then(r => JSON.stringify(r.violations))")
    return {one["id"]: (one["impact"], one["nodes"][0]["html"][:300]) for one in json.loads(found)}


class Browser:
    """A tab: what it asked for, what its console said, and pictures of it."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self._next, self._buffer, self._session = 0, b"", ""
        self._loads = 0
        self.requests: list[str] = []
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        self._write.write(
            json.dumps({**message, **({"sessionId": self._session} if self._session else {})}).encode() + b"\0"
        )
        self._write.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 60)
            assert ready, "the browser has said nothing for a minute"
            part = os.read(self._read.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        one, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(one)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.console.append(f"dialog: {params['message']}")

    def open(self, page: Path | str, *, width: int, dark: bool) -> None:
        """Open a file or an address at a width, in light or dark mode, and wait until it has loaded."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        mode = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[mode])
        before = self._loads
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self._wait_for_load(before)

    def _wait_for_load(self, before: int) -> None:
        while self._loads == before:
            self._receive()

    def click(self, selector: str) -> None:
        """Click on the first link that a selector finds, and wait until its page has loaded."""
        found = f"document.querySelector({json.dumps(selector)})"
        # Of a link that goes on in the next line, the first line is clicked on.
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        spot = self.run(
            f"(box => ({{x: box.x + box.width / 2, y: box.y + box.height / 2}}))({found}.getClientRects()[0])"
        )
        before = self._loads
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **spot, button="left", clickCount=1)
        self._wait_for_load(before)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def take_picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser; skips the test loudly where there is none."""
    if PROGRAM is None:
        pytest.skip("NO BROWSER: install chromium to look at pages; nothing of this test has run")
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-") as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command = [PROGRAM, *flags, "--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}"]
        # The browser reads from descriptor 3 and writes to 4.
        shell = f'exec "$@" 3<&{their_read} 4>&{their_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(their_read, their_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )  # fmt: skip
        os.close(their_read)
        os.close(their_write)
        try:
            yield Browser(our_write, our_read)
        finally:
            process.terminate()
            process.wait(timeout=30)
