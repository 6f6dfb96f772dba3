"""Headless Chromium, driven over a pipe by its DevTools protocol; it reaches this machine alone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium")
"""None where it is not installed (Debian: chromium)."""
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which does not start as root; only our own pages are opened
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
_FIRST_FD = 64  # of pipes, out of the way of 3 and 4, where Chromium expects them
_ANSWER_S = 120.0


class BrowserError(Exception):
    """What the browser refused, what a script in it threw, or what did not happen in time."""


class Browser:
    """One Chromium with a profile of its own, gone when left."""

    def __enter__(self) -> Browser:
        if CHROMIUM is None:
            raise BrowserError("there is no chromium on PATH (Debian: apt-get install chromium)")
        self._profile = tempfile.mkdtemp(prefix="blockzoo-chromium-")
        flags = (*_FLAGS, f"--user-data-dir={self._profile}")
        in_child, self._out = map(_high, os.pipe())
        self._in, out_child = map(_high, os.pipe())
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{in_child} 4>&{out_child}', CHROMIUM, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(in_child, out_child),
            start_new_session=True,
        )
        os.close(in_child)
        os.close(out_child)
        self._number = 0
        self._unread = b""
        self._tabs: dict[str, Tab] = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        """A new tab at an address, once it is loaded; up to 600 pixels wide it is a phone's."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.look(width, height, dark)
        tab.call("Page.navigate", url=url)
        tab.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        return tab

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """A command's result; events that come before it go to their tabs."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer.get("sessionId") in self._tabs:
                self._tabs[answer["sessionId"]].on_event(answer["method"], answer["params"])

    def _read(self, deadline: float) -> Any:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._in], [], [], left)[0]:
                raise BrowserError(f"chromium did not answer within {_ANSWER_S:.0f} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise BrowserError(f"chromium ended with status {self._process.wait()}")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        return json.loads(text)


class Tab:
    """One page.

    Attributes:
        problems: errors and warnings of the console, uncaught exceptions, violations of a policy.
        requests: addresses that were asked for.
    """

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> Any:
        """A command to this page."""
        return self._browser.call(method, self._session, **parameters)

    def close(self) -> None:
        """Close it."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Change the size in CSS pixels, and what the user prefers."""
        phone = width <= 600
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited. Raises BrowserError for what it throws."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(f"{expression[:200]}: {_thrown(found['exceptionDetails'])}")
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 120.0) -> Any:
        """Ask until an expression is true; its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {timeout_s:g} s: {expression}; problems: {self.problems}")
            time.sleep(0.05)
        return value

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key by its name and number; modifiers: 2 for control."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" and not modifiers else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **names, **text)

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field as a user does."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.evaluate("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def on_event(self, method: str, event: Mapping[str, Any]) -> None:
        """Keep what tests ask for."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(_thrown(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(item.get("value")) for item in event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")


def _high(fd: int) -> int:
    moved: int = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    os.close(fd)
    return moved


def _thrown(details: Mapping[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details["text"]))
