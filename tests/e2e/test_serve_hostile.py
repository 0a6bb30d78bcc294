"""Hostile requests: every field by every bad value, and the HTTP attacks. After each the server lives, answers the next
good request, and neither its memory nor its descriptors grow."""
import json
import os
import socket
import time

import pytest

from serving import Server, chat

PARIS = "The capital of France is Paris."
GOOD = chat("What is the capital of France?")
BAD_VALUES = ["", "x", -1, 0, 0.5, 2**31, 2**63, -2**63, 10**30, 1e308, True, False, [], {}, [[]], [None], {"a": 1}, "\u0000", "\ud7ff" * 3,
              [1, "x"], {"": ""}]
FIELDS = ["model", "messages", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
          "n", "seed", "stop", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "logit_bias", "stream",
          "stream_options", "tools", "tool_choice", "response_format", "chat_template_kwargs", "reasoning_effort",
          "thinking_budget", "ignore_eos", "parallel_tool_calls"]
COMPLETION_FIELDS = ["prompt", "echo", "logprobs", "best_of", "suffix", "max_tokens", "n"]
MESSAGE_FIELDS = ["role", "content", "tool_calls", "reasoning_content"]


@pytest.fixture(scope="module")
def server():
    s = Server("--max-running", "8", "--max-queue", "64")
    yield s
    assert s.alive(), s.log
    assert s.stop() == 0, s.log


def good(server):
    assert server.post("/v1/chat/completions", {**GOOD, "max_tokens": 12})["choices"][0]["message"]["content"] == PARIS


def send(server, path, body):
    """An answer of either kind; a refusal is an error object that names something."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = server.request("POST", path, data)
    assert status in (200, 400, 404, 413), (status, answer[:300])
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"] and error["type"]
    return status


def test_every_field_by_every_bad_value(server):
    n = refused = 0
    for field in FIELDS:
        for value in BAD_VALUES:
            status = send(server, "/v1/chat/completions", {**GOOD, "max_tokens": 1, field: value})
            n += 1
            refused += status != 200
        good(server)
    for field in COMPLETION_FIELDS:
        for value in BAD_VALUES:
            send(server, "/v1/completions", {"prompt": "x", "max_tokens": 1, field: value})
            n += 1
    for field in MESSAGE_FIELDS:
        for value in BAD_VALUES:
            send(server, "/v1/chat/completions", {"max_tokens": 1, "messages": [{"role": "user", "content": "x", field: value}]})
            send(server, "/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "x", field: value}]})
            n += 2
    for field in ("input", "instructions", "max_output_tokens", "text", "tools", "reasoning", "previous_response_id"):
        for value in BAD_VALUES:
            send(server, "/v1/responses", {"input": "x", "max_output_tokens": 1, field: value})
            n += 1
    good(server)
    assert n > 900 and refused > 300


BODIES = {
    "nothing": b"",
    "no JSON": b"x",
    "half": b'{"messages": [',
    "two": b"{}{}",
    "array": b"[]",
    "null": b"null",
    "duplicate key": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_tokens": 2}',
    "escaped duplicate": b'{"messages": [{"role": "user", "content": "x"}], "n": 1, "\\u006e": 2}',
    "deep": b'{"messages": ' + b"[" * 100000,
    "deep tools": b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep unknown field": b'{"messages": [{"role": "user", "content": "x"}], "zzz": ' + b'{"a":' * 20000 + b"1" + b"}" * 20000 + b"}",
    "bad UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "overlong UTF-8": b'{"messages": [{"role": "user", "content": "\xc0\x80"}]}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "bad UTF-8 in a key": b'{"\xff": 1}',
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "1e999": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "huge number": b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 100000 + b"}",
    "empty messages": b'{"messages": []}',
    "no messages": b'{"model": "tandem-tiny"}',
    "other model": b'{"model": "../../etc/passwd", "messages": [{"role": "user", "content": "x"}]}',
    "image": b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
    "long prompt": json.dumps({"messages": [{"role": "user", "content": "word " * 300000}]}).encode(),
    "100,000 messages": json.dumps({"messages": [{"role": "user", "content": "x"}] * 100000}).encode(),
    "100,000 stops": json.dumps({**GOOD, "stop": ["x"] * 100000}).encode(),
    "1 MB stop": json.dumps({**GOOD, "stop": "x" * 1000000}).encode(),
    "bias beyond the vocabulary": json.dumps({**GOOD, "logit_bias": {"8192": 1}}).encode(),
    "bias of a negative id": json.dumps({**GOOD, "logit_bias": {"-1": 1}}).encode(),
    "bias of 1e30": json.dumps({**GOOD, "logit_bias": {"1": 1e30}}).encode(),
    "100,000 biases": json.dumps({**GOOD, "logit_bias": {str(i): 1 for i in range(100000)}}).encode(),
    "n of a million": json.dumps({**GOOD, "n": 1000000}).encode(),
    "self-referential schema": json.dumps({**GOOD, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"$ref": "#"}}}}).encode(),
    "pattern that looks ahead": json.dumps({**GOOD, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "string", "pattern": "(?=a)b"}}}}).encode(),
    "pattern that refers back": json.dumps({**GOOD, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "string", "pattern": "(a+)\\1"}}}}).encode(),
    "huge schema": json.dumps({**GOOD, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"anyOf": [{"type": "array", "items": {"type": "string"}}] * 5000}}}}).encode(),
    "tool without a name": json.dumps({**GOOD, "tools": [{"type": "function", "function": {}}]}).encode(),
    "tool with a bad type": json.dumps({**GOOD, "tools": [{"type": {}}]}).encode(),
    "1,000 tools": json.dumps({**GOOD, "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server, name):
    assert send(server, "/v1/chat/completions", BODIES[name]) in (400, 404, 413)
    if name in ("deep", "long prompt", "100,000 messages", "huge schema"):
        good(server)


def test_catastrophic_pattern(server):
    """Backtracking would take forever; an automaton has a state or two."""
    body = {**GOOD, "max_tokens": 8, "response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "string", "pattern": "^(a+)+b$"}}}}
    answer = server.post("/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].startswith('"a')
    good(server)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/tokenize", "/detokenize",
                                  "/apply-template"])
def test_bodies_elsewhere(server, path):
    for name in ("nothing", "no JSON", "half", "array", "null", "deep", "bad UTF-8", "empty messages", "other model"):
        assert send(server, path, BODIES[name]) in (400, 404), name


def test_tokens_out_of_range(server):
    for ids in ([-1], [8192], [2**31], [2**63], [1.5], ["x"], [[1]], [None]):
        assert send(server, "/v1/completions", {"prompt": ids, "max_tokens": 1}) in (400, 200)
        assert send(server, "/detokenize", {"tokens": ids}) == 400
    context = 2048
    assert send(server, "/v1/completions", {"prompt": [5] * (context + 1), "max_tokens": 1}) == 400
    full = server.post("/v1/completions", {"prompt": [5] * context, "max_tokens": 1})
    assert full["choices"][0]["finish_reason"] == "length" and full["usage"]["completion_tokens"] == 0
    almost = server.post("/v1/completions", {"prompt": [5] * (context - 1), "max_tokens": 10, "ignore_eos": True})
    assert almost["usage"]["completion_tokens"] == 1 and almost["choices"][0]["finish_reason"] == "length"


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
RAW = {
    "nothing": b"",
    "noise": os.urandom(2000),
    "zeros": b"\0" * 5000,
    "half a request line": b"GET /li",
    "HTTP/0.9": b"GET /live\r\n\r\n",
    "HTTP/9": b"GET /live HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "bare line feeds": b"GET /live HTTP/1.1\nHost: localhost\n\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}xxx",
    "length and chunks": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{}",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\n{}",
    "huge length": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "length beyond the body": HEAD + b"Content-Length: 100\r\n\r\n{}",
    "chunk size overflow": HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "folded header": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    "NUL in a header": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "huge header": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1000000 + b"\r\n\r\n",
    "100,000 headers": b"GET /live HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 100000 + b"\r\n",
    "huge path": b"GET /" + b"a" * 1000000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "traversal": b"GET /..%2f..%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in the path": b"GET /live%00x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "upgrade": b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "expect": HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    "no Host": b"GET /live HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /live HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "pipelined": b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
    "absolute form": b"GET http://localhost/live HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "unknown method": b"FROB /live HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_bytes(server, name):
    answer = server.raw(RAW[name], wait=0.5)
    assert b"root:" not in answer
    assert server.get("/live")


def test_wrong_method_and_route(server):
    assert server.request("GET", "/v1/chat/completions")[0] == 405
    assert server.request("POST", "/live", {})[0] == 405
    for path in ("/etc/passwd", "/v1", "/v1/models/other", "/../live"):
        assert server.request("GET", path)[0] == 404
    status, _, body = server.request("POST", "/v1/messages/nothing", {})
    assert status == 404 and json.loads(body)["type"] == "error"


def test_rebinding_and_other_origins(server):
    for host, origin, allowed in (("localhost:1", None, True), ("127.0.0.1", None, True), ("evil.example", None, False),
                                  ("localhost.evil.example", None, False), ("127.0.0.1.evil.example", None, False),
                                  ("localhost", "http://evil.example", False), ("localhost", "null", False),
                                  (f"localhost:{server.port}", f"http://localhost:{server.port}", True)):
        headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
        status, got, _ = server.request("GET", "/v1/models", headers=headers)
        assert (status == 200) == allowed, (host, origin, status)
        assert "Access-Control-Allow-Origin" not in got


def test_body_limit(server):
    status, _, body = server.request("POST", "/v1/chat/completions", b"x" * (9 << 20))
    assert status == 413 and "8388608" in json.loads(body)["error"]["message"]
    huge = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + b"x" * (1 << 20) + b"\r\n") * 9 + b"0\r\n\r\n"
    assert b" 413 " in server.raw(huge, wait=10, close=False).split(b"\r\n")[0]


def test_slow_senders_do_not_hold_places():
    """A head byte by byte, a body that stops: dropped at the deadlines, while others are served."""
    s = Server()
    try:
        slow = [socket.create_connection((s.host, s.port)) for _ in range(200)]
        for c in slow:
            c.sendall(b"GET /live HTT")
        begin = time.time()
        good(s)
        end = time.time() + 15
        for c in slow:
            c.settimeout(max(0.1, end - time.time()))
            while time.time() < end:
                try:
                    c.send(b"X")
                    time.sleep(0.0)
                    if c.recv(100) == b"":
                        break
                except OSError:
                    break
            c.close()
        assert 5 < time.time() - begin < 25
        good(s)
    finally:
        assert s.stop() == 0


def test_slow_readers_do_not_hold_others(server):
    readers = []
    for _ in range(20):
        c = socket.create_connection((server.host, server.port))
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        data = json.dumps(chat("Go on.", stream=True, ignore_eos=True, max_tokens=60, logprobs=True, top_logprobs=20)).encode()
        c.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        readers.append(c)
    good(server)
    assert server.idle(60)
    for c in readers:
        c.close()
    good(server)


def test_many_idle_connections(server):
    idle = []
    for _ in range(800):
        idle.append(socket.create_connection((server.host, server.port)))
    begin = time.time()
    good(server)
    assert time.time() - begin < 20
    for c in idle:
        c.close()
    good(server)


def test_memory_and_descriptors_stay_flat(server):
    def round_of_requests():
        for name in ("half", "deep", "bad UTF-8", "long prompt", "huge schema", "100,000 stops"):
            send(server, "/v1/chat/completions", BODIES[name])
        for name in ("noise", "two lengths", "bad chunk"):
            server.raw(RAW[name], wait=0.2)
        good(server)
    for _ in range(3):
        round_of_requests()
    rss, fds = server.rss_kb(), server.n_fds()
    for _ in range(6):
        round_of_requests()
    time.sleep(0.5)
    assert server.rss_kb() < rss + 20000
    assert server.n_fds() <= fds + 5
    assert server.metric("kv_pages_used") == 0
