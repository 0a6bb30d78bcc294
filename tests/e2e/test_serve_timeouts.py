"""Limits of time: each ends one request or one connection, says which limit it was, and leaves the server as it was."""
import json
import re
import socket
import subprocess
import time

import pytest

from serving import SLOW, Server, TANDEM, chat

PARIS = "The capital of France is Paris."
QUESTION = "What is the capital of France?"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def connect(server, data=b"", receive_buffer=None):
    s = socket.socket()
    if receive_buffer:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    s.settimeout(30 * SLOW)
    s.connect((server.host, server.port))
    s.sendall(data)
    return s


def request_bytes(body):
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def rest_of(s):
    got = b""
    try:
        while piece := s.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    s.close()
    return got


def timeouts(server, limit):
    _, _, text = server.request("GET", "/metrics")
    return int(re.search(rf'^tandem_timeouts_total{{limit="{limit}"}} (\d+)$', text.decode(), re.M).group(1))


def good(server):
    assert server.post("/v1/chat/completions", chat(QUESTION))["choices"][0]["message"]["content"] == PARIS


@pytest.mark.parametrize("stream", [False, True])
def test_queue(stream):
    s = Server("--max-running", "1", "--timeouts", f"queue={0.5 * SLOW:g}")
    try:
        first = connect(s, request_bytes(chat("Go on.", stream=True, ignore_eos=True, max_tokens=1900)))
        end = time.time() + 30 * SLOW
        while not s.metric("requests_running") and time.time() < end:
            time.sleep(0.01)
        if stream:
            lines = s.events("/v1/chat/completions", chat(QUESTION, stream=True))
            error = json.loads(lines[-1].removeprefix("data: "))["error"]
            assert error["code"] == 503
        else:
            error = s.post("/v1/chat/completions", chat(QUESTION), status=503)["error"]
        assert f"{0.5 * SLOW:g} s in the queue (limit: queue)" in error["message"]
        assert timeouts(s, "queue") == 1
        first.close()
        assert s.idle()
        good(s)
    finally:
        assert s.stop() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_first_token(stream):
    s = Server("--chunk", "1", "--threads", "1", "--max-running", "1", "--timeouts", "first-token=0.4")
    try:
        body = chat("Word by word, and on and on. " * 150, max_tokens=1, stream=stream)
        if stream:
            error = json.loads(s.events("/v1/chat/completions", body)[-1].removeprefix("data: "))["error"]
        else:
            error = s.post("/v1/chat/completions", body, status=503)["error"]
        assert "no token after 0.4 s (limit: first-token)" in error["message"]
        assert s.idle() and timeouts(s, "first_token") == 1 and timeouts(s, "total") == 0
        assert s.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1})["choices"]
    finally:
        assert s.stop() == 0


def test_total():
    s = Server("--timeouts", "total=1")
    try:
        # Twelve at once are slow enough that they do not end before.
        lines = s.events("/v1/chat/completions", chat("Go on.", stream=True, ignore_eos=True, max_tokens=1900, n=12))
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert "not complete after 1 s (limit: total)" in error["message"] and error["code"] == 503
        error = s.post("/v1/chat/completions", chat("Go on.", ignore_eos=True, max_tokens=1900, n=12), status=503)["error"]
        assert "(limit: total)" in error["message"]
        assert s.idle() and timeouts(s, "total") == 2
        good(s)
    finally:
        assert s.stop() == 0


def test_a_stream_that_is_not_read():
    """It is dropped, its computation with it, and the log says why; a slow but steady reader is served."""
    s = Server("--timeouts", f"read={SLOW:g}", "--log-requests")
    try:
        body = chat("Go on.", stream=True, ignore_eos=True, max_tokens=1900, logprobs=True, top_logprobs=20, n=4)
        deaf = connect(s, request_bytes(body), receive_buffer=2048)
        slow = connect(s, request_bytes(chat("Go on.", stream=True, ignore_eos=True, max_tokens=100)), receive_buffer=2048)
        got, end = b"", time.time() + 60 * SLOW
        while timeouts(s, "read") == 0 and time.time() < end:
            got += slow.recv(512)
            time.sleep(0.05)
        assert timeouts(s, "read") == 1
        while b"[DONE]" not in got:
            got += slow.recv(65536)
        got = rest_of(deaf)
        assert b"200 OK" in got and b"[DONE]" not in got
        assert s.idle()
        time.sleep(0.2)
        ends = [json.loads(line)["end"] for line in s.log if line.startswith("{") and "chat/completions" in line]
        assert sorted(ends) == ["sent", "timed out: not read (limit: read)"]
        good(s)
    finally:
        assert s.stop() == 0


def test_head_body_and_idle():
    s = Server("--timeouts", f"head={SLOW:g},body={1.5 * SLOW:g},idle={0.5 * SLOW:g}")
    try:
        fds = s.n_fds()
        cases = {"head": connect(s, HEAD), "silence": connect(s), "body": connect(s, HEAD + b"Content-Length: 100\r\n\r\n{"),
                 "chunk": connect(s, HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{")}
        kept = connect(s, b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begin = time.time()
        drip = connect(s, HEAD + b"Content-Length: 100\r\n\r\n")  # a byte now and then does not help
        dripped = 0
        try:
            while dripped < 60:
                drip.send(b" ")
                dripped += 1
                time.sleep(0.1 * SLOW)
        except OSError:
            pass
        assert dripped < 40 and time.time() - begin < 6 * SLOW
        got = {name: rest_of(c) for name, c in cases.items()}
        assert got["silence"] == b""
        for name, limit in (("head", "head"), ("body", "body"), ("chunk", "body")):
            head, body = got[name].split(b"\r\n\r\n")
            error = json.loads(body)["error"]
            assert head.startswith(b"HTTP/1.1 408 ") and error["code"] == 408
            assert f"the request's {limit} is not complete after" in error["message"] and f"(limit: {limit})" in error["message"]
        answer = rest_of(kept)
        assert answer.endswith(b'{"status": "live"}') and b"408" not in answer
        assert timeouts(s, "head") == 2 and timeouts(s, "body") == 3 and timeouts(s, "idle") == 1
        drip.close()
        good(s)
        assert s.n_fds() <= fds + 2
    finally:
        assert s.stop() == 0


def test_bad_limits():
    for text in ("", "x", "queue", "queue=", "queue=0", "queue=-1", "queue=x", "queue=1;read=2", "que=1", "queue=1,", "queue=inf", "queue=nan"):
        done = subprocess.run([TANDEM, "serve", "--port", "0", "--timeouts", text], capture_output=True, text=True, timeout=60 * SLOW)
        assert done.returncode == 2 and "--timeouts" in done.stderr, (text, done.stderr)
