"""A headless Chromium for tests, driven over its debugging pipe (NUL-separated JSON); no package needed."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

CANDIDATES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
  "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)


def find() -> str | None:
  return next((path for name in CANDIDATES if (path := shutil.which(name))), None)


class Browser:
  """One page of one browser process; `console` collects errors, warnings and uncaught exceptions."""

  def __init__(self, timeout: float = 60.0):
    self._timeout = timeout
    self._profile = tempfile.mkdtemp(prefix="chromium-")
    to_read, self._out = os.pipe()
    self._in, to_write = os.pipe()
    # The browser reads commands from descriptor 3 and answers on descriptor 4.
    script = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'
    self._process = subprocess.Popen(
      ["bash", "-c", script, "bash", find(), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
      pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    self._buffer, self._id, self._session = b"", 0, None
    self.console: list[str] = []
    self.requests: list[str] = []
    self._loaded = False
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params) -> dict:
    self._id += 1
    message = {"id": self._id, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._out, json.dumps(message).encode() + b"\0")
    wanted = self._id
    while True:
      answer = self._receive()
      if answer.get("id") == wanted:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

  def _receive(self) -> dict:
    deadline = time.monotonic() + self._timeout
    while b"\0" not in self._buffer:
      if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise TimeoutError(f"the browser said nothing for {self._timeout} s")
      chunk = os.read(self._in, 1 << 20)
      if not chunk:
        raise RuntimeError("the browser closed its pipe")
      self._buffer += chunk
    line, self._buffer = self._buffer.split(b"\0", 1)
    message = json.loads(line)
    self._note(message)
    return message

  def _note(self, message: dict) -> None:
    method, params = message.get("method"), message.get("params", {})
    if method == "Runtime.exceptionThrown":
      self.console.append(json.dumps(params["exceptionDetails"])[:500])
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
      self.console.append(json.dumps(params["args"])[:500])
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
      self.console.append(params["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      self.requests.append(params["request"]["url"][:200])
    elif method == "Page.loadEventFired":
      self._loaded = True

  def open(self, path: pathlib.Path, width: int, height: int, *, dark: bool = False, still: bool = True) -> None:
    """Load a file in a window of this size; `still` asks the page not to move (prefers-reduced-motion)."""
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=width < 500,
              deviceScaleFactor=2 if width < 500 else 1)
    self.call("Emulation.setEmulatedMedia", features=[
      {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
      {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
    ])
    self.console.clear()
    self.requests.clear()
    self._loaded = False
    self.call("Page.navigate", url=path.resolve().as_uri())
    while not self._loaded:
      self._receive()

  def run(self, expression: str):
    """The value of a JavaScript expression, awaited if it is a promise."""
    result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in result:
      raise RuntimeError(json.dumps(result["exceptionDetails"])[:800])
    return result["result"].get("value")

  def screenshot(self, path: pathlib.Path, *, top: int = 0, height: int | None = None) -> None:
    """A PNG of the page, from `top` down; the whole page without a height."""
    size = self.call("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
    data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
    pathlib.Path(path).write_bytes(base64.b64decode(data))

  def close(self) -> None:
    self._process.terminate()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._out)
    os.close(self._in)
    shutil.rmtree(self._profile, ignore_errors=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
