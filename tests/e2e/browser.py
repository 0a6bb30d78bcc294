"""Headless Chromium for the tests of the web page, driven over its debugging pipe: JSON messages that end in NUL on
descriptors 3 (to it) and 4 (from it)."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. Its console errors and exceptions collect in `faults`."""

    def __init__(self, width=1100, height=750):
        self.folder = tempfile.TemporaryDirectory()
        down, self.write_fd = os.pipe()
        self.read_fd, up = os.pipe()

        def place():  # the descriptors' numbers are fixed
            a, b = fcntl.fcntl(down, fcntl.F_DUPFD, 10), fcntl.fcntl(up, fcntl.F_DUPFD, 10)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                   "--disable-extensions", "--hide-scrollbars", f"--window-size={width},{height}", "--remote-debugging-pipe",
                   f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        pass_fds=(3, 4), preexec_fn=place)
        os.close(down)
        os.close(up)
        self.last_id, self.rest, self.faults, self.session = 0, b"", [], None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")

    def close(self):
        try:
            session, self.session = self.session, None
            self.call("Browser.close", wait=5)
        except (AssertionError, OSError):
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.write_fd)
        os.close(self.read_fd)
        self.folder.cleanup()

    def receive(self, until):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read_fd], [], [], max(0, until - time.time()))
            assert ready, "the browser does not answer"
            piece = os.read(self.read_fd, 1 << 20)
            assert piece, "the browser is gone"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") == "Runtime.exceptionThrown":
            self.faults.append(message["params"]["exceptionDetails"].get("exception", {}).get("description"))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.faults.append(message["params"]["entry"]["text"])
        return message

    def call(self, method, wait=30, **params):
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        until = time.time() + wait
        while True:
            answer = self.receive(until)
            if answer.get("id") == self.last_id:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, wait=30):
        """Waits until the expression is true; returns its value."""
        end = time.time() + wait
        while time.time() < end:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page says {self.run('document.body.innerText')!r}; {self.faults}")

    def type(self, selector, text):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key="Enter"):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "")

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def phone(self):
        self.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)

    def screenshot(self, path):
        with open(path, "wb") as out:
            out.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
