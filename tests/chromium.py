"""Debian's Chromium, headless, driven over its own protocol: keys, files, pictures."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = shutil.which("chromium")


class Page:
    """A tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            found = json.loads(self._socket.recv(timeout=120))
            if found.get("id") == self._number:
                assert "error" not in found, found
                return dict(found["result"])
            self._note(found)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(str(parameters["entry"]))

    def open(self, address: str) -> None:
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && !!document.getElementById('ask')")

    def value(self, script: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> None:
        for _ in range(int(seconds / 0.1)):
            if self.value(script):
                return
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "Space": 32, "ArrowDown": 40}
        event = {"key": " " if key == "Space" else key, "code": key,
                 "windowsVirtualKeyCode": codes[key]}  # fmt: skip
        if key == "Enter":
            event["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def picture(self, path: Path) -> None:
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A fresh browser with one tab, its profile in ``folder``."""
    assert PROGRAM is not None
    command = [
        PROGRAM, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}",
        "--no-first-run", "--no-proxy-server", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", "--disable-gpu", "--disable-dev-shm-usage", "about:blank",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # it will not start as root otherwise
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file = folder / "DevToolsActivePort"
            for _ in range(1200):
                if port_file.exists() and port_file.read_text().count("\n"):
                    break
                time.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            import httpx

            tabs = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False, timeout=60).json()
            address = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
            with connect(address, max_size=1 << 26, proxy=None, open_timeout=60) as socket:
                yield Page(socket)
        finally:
            process.terminate()
