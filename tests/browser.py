"""Chromium without a window, driven by the DevTools protocol over two pipes: no port, no library, no second program.

A ``Tab`` presses keys and buttons as a user does, and evaluates JavaScript to look at the page.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.programs import require_program

PROGRAM = "chromium-headless-shell"
FLAGS = [
    "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--mute-audio", "--force-color-profile=srgb",
    "--disable-features=BackForwardCache",
]  # fmt: skip
TIMEOUT = 10.0
KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "Tab": ("", 9), "ArrowUp": ("", 38), "ArrowDown": ("", 40)}
SHIFT = 8


class BrowserError(AssertionError):
    """What the browser refused, or the page threw."""


class Browser:
    def __init__(self) -> None:
        require_program(PROGRAM, PROGRAM)
        self.folder = tempfile.mkdtemp(prefix="qwen-tests-browser-")
        flags = [*FLAGS, f"--user-data-dir={self.folder}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        (command_out, self._send), (self._receive, answer_in) = _pipe(), _pipe()
        log = os.open(os.path.join(self.folder, "log"), os.O_CREAT | os.O_WRONLY, 0o600)
        # The browser reads commands from descriptor 3 and writes to 4, which may be those of the log until then.
        moves = [(log, 1), (log, 2), (command_out, 3), (answer_in, 4)]
        self._process = os.posix_spawn(
            shutil.which(PROGRAM) or PROGRAM,
            [PROGRAM, *flags, "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, old, new) for old, new in moves],
            setpgroup=0,
        )
        for descriptor in (command_out, answer_in, log):
            os.close(descriptor)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(time.monotonic() + TIMEOUT, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self, until: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._receive], [], [], max(0.0, until - time.monotonic()))[0]:
                raise BrowserError(f"{method}: no answer in {TIMEOUT:.0f} s")
            received = os.read(self._receive, 1 << 20)
            if not received:
                raise BrowserError(f"{method}: the browser ended: {Path(self.folder, 'log').read_text()[-2000:]}")
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def new_profile(self) -> str:
        """Return a context with a storage of its own, as a private window has."""
        return str(self.call("Target.createBrowserContext")["browserContextId"])

    def drop_profile(self, profile: str) -> None:
        self.call("Target.disposeBrowserContext", browserContextId=profile)

    def close(self) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._send)
        os.close(self._receive)
        shutil.rmtree(self.folder, ignore_errors=True)


def _pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are none of 0 to 9, so that moving one never hides another."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


class Tab:
    def __init__(self, browser: Browser, profile: str, url: str, width: int = 1100, height: int = 800) -> None:
        self.browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank", browserContextId=profile)["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.begin(url, width, height)

    def begin(self, url: str, width: int = 1100, height: int = 800) -> None:
        """Open an address as a new tab does."""
        self.resize(width, height)
        self.open(url)

    def end(self) -> None:
        """Forget what the page has stored, and undo what was set for it."""
        origin = self.evaluate("sessionStorage.clear(), location.origin")
        self.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.call("Emulation.setEmulatedMedia", features=[])
        self.be_offline(False)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self._session, **parameters)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href === new URL({json.dumps(url)}).href")

    def reload(self) -> None:
        self.evaluate("window.isOld = true")
        self.call("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def resize(self, width: int, height: int, is_phone: bool = False) -> None:
        scale = 2 if is_phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=is_phone,
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def be_offline(self, is_offline: bool = True) -> None:
        speeds = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=is_offline, **speeds)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if fault := answer.get("exceptionDetails"):
            raise BrowserError(f"{expression}: {fault.get('exception', {}).get('description', fault['text'])}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = TIMEOUT) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while True:
            try:
                if self.evaluate(f"Boolean({expression})"):
                    return
            except BrowserError:
                pass  # between two pages there is nothing to evaluate in
            if time.monotonic() > until:
                shown = self.evaluate("document.body.innerText")
                raise BrowserError(f"not within {seconds:.0f} s: {expression}\nThe page shows:\n{shown}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def count(self, selector: str) -> int:
        return int(self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        text, code = KEYS[key]
        parts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **parts, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **parts)

    def click(self, selector: str) -> None:
        """Click the middle of an element, which must be what a user would hit there."""
        place = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'nearest'}); const box = node.getBoundingClientRect();"
            "const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];"
            "const hit = document.elementFromPoint(x, y);"
            "return [x, y, node.contains(hit) || (hit?.outerHTML ?? '')]; })()"
        )
        if place[2] is not True:
            raise BrowserError(f"{selector} is covered by {str(place[2])[:200]}")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def faults(self) -> list[str]:
        """Return what the page threw or logged as an error, violations of its security policy included."""
        self.evaluate("1")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        return found

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self._target)
