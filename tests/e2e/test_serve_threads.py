"""Everything at once: constrained answers, streams, clients that leave, a full queue, keys read again, metrics, and a drain
in the middle of it. Every thread of the server meets every other; ThreadSanitizer's build runs this (make tsan-serve)."""
import http.client
import json
import random
import signal
import socket
import struct
import threading
import time

from serving import PATIENCE, SLOW, Server, chat

KEY = "a-key-of-this-test"
SCHEMAS = [{"type": "object", "properties": {"a": {"enum": list(range(9 + i))}, "b": {"type": "string", "maxLength": 4 + i}},
            "required": ["a", "b"], "additionalProperties": False} for i in range(3)]
SCHEMAS += [{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0]}}]


class Users:
    """Threads that ask at random until they are told to stop. What went wrong is in `wrong`."""

    def __init__(self, server, n):
        self.server, self.stop, self.lock = server, threading.Event(), threading.Lock()
        self.counts, self.wrong = dict.fromkeys(("whole", "refused", "left", "scraped"), 0), []
        self.threads = [threading.Thread(target=self.live, args=(i,)) for i in range(n)]
        for t in self.threads:
            t.start()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def live(self, i):
        rng = random.Random(i)
        while not self.stop.is_set():
            try:
                self.count(getattr(self, rng.choice(["structured", "structured", "tool", "plain", "leave", "leave", "scrape"]))(rng))
            except (AssertionError, ValueError, KeyError, OSError, http.client.HTTPException) as e:
                if not self.stop.is_set():  # later the server may be gone
                    with self.lock:
                        self.wrong.append(repr(e))
                return

    def ask(self, body, path="/v1/chat/completions"):
        status, _, data = self.server.request("POST", path, body, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
        if status in (429, 503):
            return None
        assert status == 200, (status, data[:300])
        return data.decode()

    def structured(self, rng):
        schema, stream, n = rng.choice(SCHEMAS), rng.random() < 0.5, rng.choice([1, 1, 2])
        data = self.ask(chat(f"JSON {rng.random()}", temperature=1, n=n, stream=stream, max_tokens=200, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}))
        if data is None or self.stop.is_set():
            return "refused"
        texts, ends = [""] * n, [None] * n
        if stream:
            assert "data: [DONE]" in data, data[-300:]
        for chunk in [json.loads(line[6:]) for line in data.split("\n") if line.startswith("data: {")] if stream else [json.loads(data)]:
            for c in chunk["choices"]:
                texts[c["index"]] += c["delta" if stream else "message"].get("content") or ""
                ends[c["index"]] = ends[c["index"]] or c["finish_reason"]
        for text, end in zip(texts, ends):
            if end == "stop":
                assert isinstance(json.loads(text), dict if schema["type"] == "object" else list), text
        return "whole"

    def tool(self, rng):
        data = self.ask({"messages": [{"role": "user", "content": f"Call {rng.random()}"}], "max_tokens": 40, "tools": [
            {"name": "f", "input_schema": SCHEMAS[1]}], "tool_choice": {"type": "any"}, "stream": rng.random() < 0.5}, "/v1/messages")
        return "whole" if data else "refused"

    def plain(self, rng):
        data = self.ask({"prompt": "word " * rng.choice([1, 40, 200]), "max_tokens": 8, "stream": rng.random() < 0.5, "logprobs": 2}, "/v1/completions")
        return "whole" if data else "refused"

    def leave(self, rng):
        data = json.dumps(chat(f"Go on {rng.random()}", stream=rng.random() < 0.7, ignore_eos=True, max_tokens=500, n=rng.choice([1, 3]), **(
            {"response_format": {"type": "json_object"}} if rng.random() < 0.5 else {}))).encode()
        with socket.create_connection((self.server.host, self.server.port), timeout=60) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
                      % (KEY.encode(), len(data)) + data)
            time.sleep(rng.random() * 0.1 * SLOW)
            if rng.random() < 0.5:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "left"

    def scrape(self, rng):
        path = rng.choice(["/metrics", "/ready", "/version", "/v1/models", "/live"])
        status, _, _ = self.server.request("GET", path, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
        assert status in (200, 503), (path, status)
        return "scraped"

    def end(self):
        self.stop.set()
        for t in self.threads:
            t.join()


def serve(tmp_path, *args):
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    return Server("--api-key-file", str(keys), "--max-queue", "6", "--max-running", "6", "--kv-tokens", "4096", "--log-requests", *args)


def idle(server, wait=30):
    end = time.time() + wait * PATIENCE
    while time.time() < end:
        _, _, text = server.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line and line[0] != "#")
        if not any(float(values[f"tandem_{k}"]) for k in ("requests_running", "requests_waiting", "kv_pages_used")):
            return True
        time.sleep(0.05)
    return False


def test_everything_at_once(tmp_path):
    server = serve(tmp_path)
    try:
        users = Users(server, 14)
        for _ in range(12):
            time.sleep(0.5 * min(SLOW, 3))
            server.process.send_signal(signal.SIGHUP)
        users.end()
        assert not users.wrong and idle(server), users.wrong
        assert all(users.counts[k] > 0 for k in ("whole", "refused", "left", "scraped")), users.counts
    finally:
        assert server.stop() == 0


def test_a_drain_in_the_middle(tmp_path):
    """Streams that have begun end whole; a second signal ends those that cannot."""
    for signals in (1, 2):
        server = serve(tmp_path, "--grace", "120")
        users = Users(server, 10)
        time.sleep(1.5 * min(SLOW, 3))
        users.stop.set()
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        status = server.process.wait(150)
        users.end()
        assert status == 0 and not users.wrong, users.wrong
