"""A headless Chromium for tests, over a pipe: as much of its DevTools protocol as they use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

# what every expression may use: `all` elements of a page that a selector names, behind shadow roots
# as well; those `inside` of what another selector names; the `text` of one; all that one `shown`
HELPERS = """
function everything(root = document) {
  const found = [];
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) found.push(...everything(element.shadowRoot));
  }
  return found;
}
const all = (selector) => everything().filter((e) => e.matches(selector));
const below = (e) => [...(e.shadowRoot ? everything(e.shadowRoot) : []), ...everything(e)];
const inside = (host, selector) =>
  all(host).flatMap((e) => below(e).filter((part) => part.matches(selector)));
const text = (e) => e.textContent.trim();
const shown = (e) => below(e).filter((part) => !part.children.length && !part.matches('style'))
  .map(text).join(' ');
"""


def install() -> str:
    """Return the path of chromium, from Debian's package where it is missing and we are root.

    Raises:
        RuntimeError: there is none, and why.
    """
    if path := shutil.which("chromium"):
        return path
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError("chromium is missing, and only root on Debian can install it here")
    get = ["apt-get", "-q", "-y"]
    for command in ([*get, "update"], [*get, "install", "--no-install-recommends", "chromium"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    path = shutil.which("chromium")
    assert path is not None
    return path


class Browser:
    """One page of one browser.

    Args:
        program: path of chromium.
        folder: of its profile.
        width: of the page, in pixels.
        height: of the page, in pixels.
    """

    def __init__(
        self, program: str, folder: Path, *, width: int = 1600, height: int = 1400
    ) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # it reads commands from 3 and answers on 4; the shell puts our ends of the pipes there
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "browser"]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", "--no-first-run", "--disable-background-networking"]
        flags += [f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        with open(folder.with_suffix(".log"), "wb") as log:
            self._process = subprocess.Popen(
                [*shell, program, *flags],
                pass_fds=(to_read, to_write),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(to_read)
        os.close(to_write)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(30)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer to a command of the protocol.

        Raises:
            RuntimeError: the browser refuses it.
            EOFError: the browser has ended.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass  # an event, which nobody asked for
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression gives in the page; a promise is awaited.

        Raises:
            AssertionError: it throws.
        """
        answer = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {HELPERS} return ({expression}); }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, *, timeout_s: float = 60.0) -> Any:
        """Return an expression's value as soon as it is true.

        Raises:
            AssertionError: it was not in time; says what the page shows.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                value = self.value(expression)
            except (AssertionError, RuntimeError) as error:  # the page is just going away
                value, why = None, f"throws {error}"
            else:
                why = "never true"
            if value:
                return value
            if time.monotonic() > end_s:
                shown = self.value("document.body.innerText")
                raise AssertionError(f"{why}: {expression}\nthe page: {shown[:3000]}")
            time.sleep(0.1)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            part = os.read(self._from, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer
