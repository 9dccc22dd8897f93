"""A real Chromium without a window, through its developer tools' protocol: pages opened, watched, photographed."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: Seconds for an answer of the browser, on a busy machine.
PATIENCE = 60.0
AXE = Path(__file__).parents[1] / "data" / "axe-core" / "axe.min.js"


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser. `requests` are the URLs that it asked for, the opened file's own left out."""

    def __init__(self, folder: Path, path: str):
        """folder: for the browser's own files, empty. path: of its program."""
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += ["--disable-extensions", "--disable-background-networking", "--disable-component-update"]
        flags += [f"--user-data-dir={folder}", "--disable-dev-shm-usage", "--hide-scrollbars", "about:blank"]
        # It reads commands from descriptor 3 and writes answers to 4.
        redirected = f'exec "$@" 3</dev/fd/{to_browser} 4>/dev/fd/{from_browser}'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", redirected, "sh", path, *flags],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"HOME": str(folder)},
        )
        os.close(to_browser)
        os.close(from_browser)
        self._ids = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.problems: list[str] = []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._to)
        os.close(self._from)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive(PATIENCE)).get("id") != number:
            pass
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next message; events are noted."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"the browser gave no answer within {seconds:.0f} s")
            if not (part := os.read(self._from, 1 << 20)):
                raise AssertionError("the browser ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, content = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(content["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.problems.append(content["entry"]["text"])
        return message

    def open(self, path: Path, width: int = 1400, height: int = 1000, theme: str = "light") -> float:
        """Open a file of this machine, and give the seconds until it was loaded."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        url = path.resolve().as_uri()
        self.requests.clear()
        self.problems.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=url)
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        seconds = time.monotonic() - began
        self.requests = [each for each in self.requests if each != url and not each.startswith("data:")]
        return seconds

    def visit(self, url: str, width: int = 1400, height: int = 2400) -> None:
        """Begin to open a page of a server, also where only what follows # differs."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def lacking(self, texts: Sequence[str], seconds: float = PATIENCE) -> list[str]:
        """Those of these texts that the page does not show within some seconds."""
        code = LACKING.replace("TEXTS", json.dumps([*texts])).replace("MILLISECONDS", str(1000 * min(seconds, 50)))
        return list(self.run(code))

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression, or of what its promise gives."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"].get("exception", {}).get("description", str(found)))
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Keys by name, as Tab, Enter, or a character."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            common = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def draw_all(self) -> list[str]:
        """Draw every figure, also those in lists to choose from; the labels of those that were not."""
        return list(self.run(DRAW_ALL))

    def axe(self, levels: Sequence[str] = ("serious", "critical")) -> list[str]:
        """What axe-core finds, of these levels."""
        if not self.run("typeof axe === 'object'"):
            self.run(AXE.read_text(encoding="utf-8") + "; 0")
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
        return [
            f"{each['id']} ({each['impact']}): {node['html'][:200]}"
            for each in found
            if each["impact"] in levels
            for node in each["nodes"]
        ]

    def screenshot(self, path: Path, full: bool = True) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        more = {"captureBeyondViewport": True, "clip": clip} if full else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))


#: Looks at what the page shows until it has all texts.
LACKING = """(async () => {
  const texts = TEXTS, ends = performance.now() + MILLISECONDS;
  const missing = () => texts.filter(text => !(document.body?.innerText ?? '').includes(text));
  while (missing().length && performance.now() < ends) await new Promise(done => setTimeout(done, 300));
  return missing();
})()"""
#: Shows each choice in turn, draws its figures, and gives the labels of those without a mark.
DRAW_ALL = """(async () => {
  const missing = [];
  const check = () => {
    for (const chart of document.querySelectorAll('.chart')) {
      if (!chart.clientWidth) continue;
      const canvas = chart.querySelector('canvas');
      const marks = canvas ? Number(canvas.width > 0) : chart.querySelectorAll('svg path, svg rect, svg text').length;
      if (!marks || !chart.dataset.drawn) missing.push(chart.getAttribute('aria-label'));
    }
  };
  const settled = async () => {
    cpspPage.drawAll();
    const ends = performance.now() + 20000;
    const waits = () => [...document.querySelectorAll('.chart')].some(c => c.clientWidth && !c.dataset.drawn);
    while (waits() && performance.now() < ends) await new Promise(requestAnimationFrame);
    check();
  };
  await settled();
  for (const select of document.querySelectorAll('.choice select')) {
    for (const option of select.options) {
      select.value = option.value;
      select.dispatchEvent(new Event('change'));
      await settled();
    }
    select.selectedIndex = 0;
    select.dispatchEvent(new Event('change'));
  }
  return [...new Set(missing)];
})()"""
