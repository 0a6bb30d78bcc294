"""Starting `tandem serve` for the end-to-end tests, and talking to it without any client library."""
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

TANDEM = os.environ.get("TANDEM", "build/tandem")
SLOW = float(os.environ.get("TANDEM_SLOW", "1"))  # of a sanitizer's build: how much longer tests wait
PATIENCE = 4 * SLOW  # of what must come: only a failure takes that long, or a machine that does much else


class Server:
    """A running server. `log` collects its stderr."""

    def __init__(self, *args, model="models/tandem-tiny", wait=120):
        self.process = subprocess.Popen([TANDEM, "serve", model, "--port", "0", *args], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log = []
        self.url = None
        ready = threading.Event()

        def read():
            for line in self.process.stderr:
                self.log.append(line.rstrip("\n"))
                if found := re.match(r"listening on (https?://\S+)", line):
                    self.url = found.group(1)
                    ready.set()
            ready.set()

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        assert ready.wait(wait * PATIENCE) and self.url, self.log
        self.host, port = re.match(r"https?://(.*):(\d+)$", self.url).groups()
        self.port = int(port)

    def stop(self, number=signal.SIGTERM, wait=60):
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(wait * PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def alive(self):
        return self.process.poll() is None

    def rss_kb(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1))

    def n_fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, bytes). `body`: an object for JSON, or bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout * PATIENCE)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def post(self, path, body, status=200, **more):
        got, _, data = self.request("POST", path, body, **more)
        assert got == status, (got, data[:500])
        return json.loads(data)

    def get(self, path, status=200, **more):
        got, _, data = self.request("GET", path, **more)
        assert got == status, (got, data[:500])
        return json.loads(data)

    def events(self, path, body, timeout=60):
        """The lines of a stream of events, without the empty ones."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout * PATIENCE)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert answer.getheader("Content-Type") == "text/event-stream"
            return [line for line in answer.read().decode().split("\n") if line]
        finally:
            connection.close()

    def metric(self, name):
        _, _, text = self.request("GET", "/metrics")
        return float(re.search(rf"^tandem_{name} (\S+)$", text.decode(), re.M).group(1))

    def raw(self, data, wait=10, close=True):
        """Sends bytes as they are, returns what comes back until the server closes or `wait` seconds pass."""
        with contextlib.closing(socket.create_connection((self.host, self.port), timeout=wait * SLOW)) as s:
            out = b""
            try:
                s.sendall(data)
                if close:
                    s.shutdown(socket.SHUT_WR)
                while piece := s.recv(65536):
                    out += piece
            except OSError:  # it was closed on us, or nothing came
                pass
            return out

    def idle(self, wait=10):
        """Waits until nothing runs and no KV page is held."""
        end = time.time() + wait * PATIENCE
        while time.time() < end:
            if not (self.metric("requests_running") or self.metric("requests_waiting") or self.metric("kv_pages_used")):
                return True
            time.sleep(0.02)
        return False


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": False}, **more}
