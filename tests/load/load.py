#!/usr/bin/env python3
"""The server under load: crowds, overload, cancellations, restarts, and what many users at once and prefixes bring.

load.py [NAME]... [--scale X]

NAME: crowd, overload, cancel, restart, streams, prefix; default: all. Each starts servers of its own on the loopback
($TANDEM, default build/tandem, with models/tandem-tiny), ends by itself and prints one line with what was measured and
the limit it is held to; status 1 if any limit was broken. --scale 0.01 does a hundredth of the work. What is compared is
measured in one run, in turns, since a machine that others use has no constant speed.
"""
import argparse
import json
import os
import pathlib
import random
import re
import resource
import select
import signal
import socket
import statistics
import struct
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from serving import Server, chat  # noqa: E402

QUESTION = "What is the capital of France?"


def request_bytes(body, path="/v1/chat/completions"):
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(name, ok, text):
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
    return ok


def first_token_seconds(server, body):
    """From connecting until the first piece of text of a stream; reads it to its end."""
    begin = time.perf_counter()
    with socket.create_connection((server.host, server.port), timeout=120) as s:
        s.sendall(request_bytes(body))
        got, first = b"", None
        while b"[DONE]" not in got:
            piece = s.recv(65536)
            assert piece, got[-300:]
            got += piece
            if first is None and re.search(rb'content": "[^"]', got):  # not the role's chunk, whose content is empty
                first = time.perf_counter() - begin
        return first


def hurry(on):
    """The clients stand for other machines: they shall not wait for the cores that the server and others keep busy, which
    would be measured as the server's time. Only root may; servers must be started before, since they would inherit it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO if on else os.SCHED_OTHER, os.sched_param(1 if on else 0))
    except PermissionError:
        pass


def until_idle(server, wait):
    assert server.idle(wait), "the server does not become idle"


def until_quiet(server, wait, n_fds):
    """Idle, and for a second no connection is open, so that no request can be on its way any more."""
    end, since = time.time() + wait, time.time()
    while time.time() - since < 1:
        assert time.time() < end, f"the server does not become quiet: {server.n_fds()} descriptors, {n_fds} at its start"
        if not server.idle(wait) or server.n_fds() > n_fds:
            since = time.time()
        time.sleep(0.1)


# ---- Crowd: idle connections, slow senders, slow readers

class Crowd:
    def __init__(self, server, n_idle, n_senders, n_readers):
        self.stopping = False
        self.idle, self.senders, self.readers = [], [], []
        # Half read a stream, half an answer of a megabyte, most of which waits in the server.
        heavy = (request_bytes(chat("Go on.", stream=True, ignore_eos=True, max_tokens=20, logprobs=True, top_logprobs=20)),
                 request_bytes({"prompt": "a b c d e f g h " * 4000, "return_token_strs": True}, "/tokenize"))
        for i in range(n_readers):
            self.readers.append(self.connect(server, 2048))
            self.readers[-1].sendall(heavy[i % 2])
            if i % 100 == 99:  # their answers are computed before anything is measured
                until_idle(server, 300)
        until_idle(server, 300)
        for i in range(n_idle):
            self.idle.append(self.connect(server))
            if i % 2:
                self.idle[-1].sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for i in range(n_senders):
            self.senders.append(self.connect(server))
            self.senders[-1].sendall(request_bytes(chat("x"))[:-30] if i % 2 else b"GET /live HTTP/1.1\r\nX: ")
        self.thread = threading.Thread(target=self.drip)
        self.thread.start()

    @staticmethod
    def connect(server, receive_buffer=None):
        s = socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.connect((server.host, server.port))
        return s

    def drip(self):
        """Each slow one moves a little once a second."""
        while not self.stopping:
            for s in self.senders:
                try:
                    s.send(b" ")
                except OSError:
                    pass
            for s in self.readers:
                try:
                    s.recv(16, socket.MSG_DONTWAIT)
                except OSError:
                    pass
            time.sleep(1)

    def close(self):
        self.stopping = True
        self.thread.join()
        for s in self.idle + self.senders + self.readers:
            s.close()


def crowd(scale):
    n_idle, n_slow, rounds, n_good = (max(20, int(10000 * scale)), max(10, int(500 * scale)), 3, max(20, int(150 * scale)))
    server = Server("--timeouts", "head=3000,body=3000,idle=3000,read=3000", "--max-queue", "2000")
    good = chat(QUESTION, stream=True, max_tokens=4)
    calm_times, crowd_times = [], []
    try:
        for _ in range(20):
            first_token_seconds(server, good)
        for _ in range(rounds):
            calm_times += [first_token_seconds(server, good) for _ in range(n_good)]
            people = Crowd(server, n_idle, n_slow, n_slow)
            n_fds = server.n_fds()
            assert n_fds > n_idle + 2 * n_slow, n_fds
            crowd_times += [first_token_seconds(server, good) for _ in range(n_good)]
            people.close()
            end = time.time() + 60
            while server.n_fds() > 100 and time.time() < end:
                time.sleep(0.1)
        calm, crowded = percentile(calm_times, 0.99), percentile(crowd_times, 0.99)
        ok = crowded <= 1.5 * calm and server.n_fds() < 100
        return report("crowd", ok, f"{n_idle} idle, {n_slow} slow senders, {n_slow} slow readers: p99 to the first token "
                      f"{crowded * 1e3:.1f} ms against {calm * 1e3:.1f} ms alone, {crowded / calm:.2f} times (limit 1.5); p50 "
                      f"{statistics.median(crowd_times) * 1e3:.1f} against {statistics.median(calm_times) * 1e3:.1f} ms; "
                      f"{len(crowd_times)} requests each, in turns; {server.rss_kb() / 1024:.0f} MiB")
    finally:
        assert server.stop() == 0


# ---- Overload

WARM = 8  # seconds until as many end as begin


class Offer:
    """Sends requests at given times over connections of their own, and takes the answers. One thread, epoll."""

    def __init__(self, server, body):
        self.server, self.data = server, request_bytes(body).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        self.poll, self.open = select.epoll(), {}
        self.good, self.rejected, self.other = [], [], 0  # seconds each; what is neither

    def begin(self):
        s = socket.socket()
        s.setblocking(False)
        begin = time.perf_counter()
        if s.connect_ex((self.server.host, self.server.port)) not in (0, 115):
            self.other += 1
            s.close()
            return
        self.open[s.fileno()] = [s, begin, b"", False]
        self.poll.register(s.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def turn(self, wait):
        for fd, what in self.poll.poll(max(0, wait), 256):
            entry = self.open[fd]
            s, begin, got, sent = entry
            try:
                if not sent and what & select.EPOLLOUT:
                    s.send(self.data)
                    entry[3] = True
                    self.poll.modify(fd, select.EPOLLIN)
                    continue
                piece = s.recv(65536)
            except OSError:
                piece = b""
            if piece and b"\r\n\r\n" not in got:
                entry[2] = got = got + piece
            if piece:
                if got.startswith(b"HTTP/1.1 429"):
                    self.end(fd, self.rejected, begin)
                continue
            self.end(fd, self.good if got.startswith(b"HTTP/1.1 200") else None, begin)

    def end(self, fd, to, begin):
        if to is None:
            self.other += 1
        else:
            to.append(time.perf_counter() - begin)
        self.poll.unregister(fd)
        self.open.pop(fd)[0].close()

    def closed_loop(self, n, seconds):
        """Goodput with n requests always in progress, once the first have ended."""
        begin, before = time.perf_counter(), 0
        while (now := time.perf_counter()) < begin + WARM + seconds:
            while len(self.open) < n:
                self.begin()
            self.turn(0.05)
            if now < begin + WARM:
                before = len(self.good)
        return (len(self.good) - before) / seconds

    def open_loop(self, rate, seconds):
        """Goodput when requests come at random times, `rate` a second."""
        begin = time.perf_counter()
        end, due = begin + WARM + seconds, begin
        n = before = 0
        while (now := time.perf_counter()) < end:
            while due <= now and len(self.open) < 15000:
                self.begin()
                n += 1
                due += random.expovariate(rate)
            self.turn(min(due, end) - now)
            if now < begin + WARM:
                before = len(self.good)
        return (len(self.good) - before) / seconds, n / (WARM + seconds)

    def close(self):
        for s, *_ in self.open.values():
            s.close()
        self.open.clear()


def overload(scale):
    seconds, body = max(5, 120 * scale), chat("Go on.", ignore_eos=True, max_tokens=32)
    server = Server("--max-queue", "64")
    peaks, goods, rates, rejected, others = [], [], [], [], 0
    try:
        hurry(True)
        Offer(server, body).closed_loop(32, 2)
        until_idle(server, 60)
        turns = 4
        for _ in range(turns):  # in turns: the machine's speed changes
            calm = Offer(server, body)
            peaks.append(calm.closed_loop(64, max(4, 15 * scale)))
            assert peaks[-1] > 0, "no request came to its end: this machine is too busy"
            calm.close()
            until_idle(server, 60)
            storm = Offer(server, body)
            good, rate = storm.open_loop(10 * peaks[-1], seconds / turns)
            goods.append(good)
            rates.append(rate)
            rejected += storm.rejected
            others += storm.other
            storm.close()
            until_idle(server, 60)
        peak, good, p99 = statistics.mean(peaks), statistics.mean(goods), percentile(rejected, 0.99)
        ok = good >= 0.9 * peak and p99 < 0.010 and others == 0 and statistics.mean(rates) > 9 * peak
        return report("overload", ok, f"{statistics.mean(rates):.0f} requests/s offered for {seconds:.0f} s, {statistics.mean(rates) / peak:.1f} "
                      f"times the peak of {peak:.1f}/s: goodput {good:.1f}/s, {100 * good / peak:.0f} % (limit 90); {len(rejected)} rejected, "
                      f"p50 {statistics.median(rejected) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms (limit 10); {others} lost")
    finally:
        hurry(False)
        assert server.stop() == 0


# ---- Cancellations

def cancel(scale):
    n, n_threads = max(300, int(100000 * scale)), 20
    # A KV that the first storm touches whole: what is kept for equal beginnings is no leak.
    server = Server("--max-queue", "512", "--kv-tokens", "4096")
    counts = {"n": 0, "refused": 0, "read": 0}
    lock = threading.Lock()

    def worker(share, seed):
        rng = random.Random(seed)
        for _ in range(share):
            body = chat(" ".join(["word"] * rng.choice([1, 5, 50, 300])) + str(rng.random()), stream=rng.random() < 0.7, ignore_eos=True,
                        max_tokens=rng.choice([1, 20, 500]), temperature=1, n=rng.choice([1, 1, 1, 3]))
            if rng.random() < 0.1:
                body |= {"response_format": {"type": "json_object"}}
            data = request_bytes(body)
            s = socket.create_connection((server.host, server.port), timeout=60)
            moment, status = rng.random(), b""
            try:
                if moment < 0.1:  # before it is complete
                    s.sendall(data[:rng.randrange(len(data))])
                else:
                    s.sendall(data)
                    if moment < 0.3:
                        pass  # at once
                    elif moment < 0.8:
                        time.sleep(rng.random() * 0.02)
                    else:  # in the middle of the answer
                        s.settimeout(0.2)
                        status = s.recv(200)
            except OSError:
                pass
            if rng.random() < 0.5:  # RST in the place of FIN
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.close()
            with lock:
                counts["n"] += 1
                counts["refused"] += status.startswith(b"HTTP/1.1 429")
                counts["read"] += status.startswith(b"HTTP/1.1 200")

    def storm(total, seed):
        threads = [threading.Thread(target=worker, args=(total // n_threads, seed * 1000 + i)) for i in range(n_threads)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        until_quiet(server, 300, n_fds)
        return server.rss_kb(), server.n_fds()

    try:
        n_fds = server.n_fds()
        begin = time.time()
        marks = [storm(n // 5, i) for i in range(5)]
        answer = server.post("/v1/chat/completions", chat(QUESTION))["choices"][0]["message"]["content"]
        until_quiet(server, 60, n_fds)
        pages, grown = server.metric("kv_pages_used"), marks[-1][0] - marks[1][0]
        ok = pages == 0 and marks[-1][1] <= n_fds and grown < 4096 and answer == "The capital of France is Paris."
        return report("cancel", ok, f"{counts['n']} cancellations in {time.time() - begin:.0f} s ({counts['read']} in the middle of an answer, "
                      f"{counts['refused']} refused): {pages:.0f} pages held, descriptors {n_fds} to {marks[-1][1]}, memory "
                      f"{' '.join(f'{m[0] / 1024:.1f}' for m in marks)} MiB after each fifth (limit: 4 MiB from the second on)")
    finally:
        assert server.stop() == 0


# ---- Restarts

def restart(scale):
    n, rng = max(3, int(100 * scale)), random.Random(1)
    counts = {"whole": 0, "refused": 0, "lost": 0}
    lock = threading.Lock()
    slowest = 0
    for _ in range(n):
        server = Server("--grace", "60")
        stop = threading.Event()

        def user(seed):
            r = random.Random(seed)
            while not stop.is_set():
                kind, got = "lost", b""
                try:
                    with socket.create_connection((server.host, server.port), timeout=90) as s:
                        s.sendall(request_bytes(chat(f"Go on {r.random()}.", stream=True, ignore_eos=True, max_tokens=r.choice([3, 30, 120]))))
                        while b"[DONE]" not in got and (piece := s.recv(65536)):
                            got += piece
                    if b"[DONE]" in got and b'"finish_reason": "length"' in got:
                        kind = "whole"
                    elif b" 200 " not in got[:30]:
                        kind = "refused"  # 503 while it drains; nothing, where it does not listen any more
                except OSError:
                    kind = "lost" if got.startswith(b"HTTP/1.1 200") else "refused"
                with lock:
                    counts[kind] += 1
                if kind != "whole":
                    return
        users = [threading.Thread(target=user, args=(rng.random(),)) for _ in range(8)]
        for u in users:
            u.start()
        time.sleep(0.05 + rng.random() * 0.5)
        server.process.send_signal(signal.SIGTERM)
        begin = time.time()
        status = server.process.wait(90)
        slowest = max(slowest, time.time() - begin)
        stop.set()
        for u in users:
            u.join()
        if status != 0:
            counts["lost"] += 1
    ok = counts["lost"] == 0 and counts["whole"] > n
    return report("restart", ok, f"{n} restarts under load: {counts['whole']} streams whole, {counts['refused']} requests refused, "
                  f"{counts['lost']} lost (limit 0); the slowest drain took {slowest:.1f} s")


# ---- Streams side by side, and prefixes

def tokens_per_second(server, n_streams, n_tokens):
    """Of streams side by side. One thread reads what comes without looking at it: the clients stand for other machines."""
    before, begin = server.metric("generated_tokens_total"), time.perf_counter()
    poll, left = select.epoll(), {}
    for i in range(n_streams):
        s = socket.create_connection((server.host, server.port))
        s.sendall(request_bytes(chat(f"Go on {i}.", stream=True, ignore_eos=True, max_tokens=n_tokens)))
        poll.register(s.fileno(), select.EPOLLIN)
        left[s.fileno()] = [s, b""]
    while left:
        for fd, _ in poll.poll():
            entry = left[fd]
            piece = entry[0].recv(65536)
            entry[1] = entry[1][-100:] + piece
            if not piece or b"[DONE]" in entry[1]:
                assert piece, entry[1]
                poll.unregister(fd)
                left.pop(fd)[0].close()
    return (server.metric("generated_tokens_total") - before) / (time.perf_counter() - begin)


def streams(scale):
    server, rounds, n_tokens = Server(), 5, max(32, int(256 * scale))
    try:
        tokens_per_second(server, 8, 16)
        one, many = [], []
        for _ in range(rounds):
            one.append(tokens_per_second(server, 1, n_tokens))
            many.append(tokens_per_second(server, 32, n_tokens))
        ratio = statistics.median(m / o for m, o in zip(many, one))
        return report("streams", ratio >= 4, f"32 streams {statistics.median(many):.0f} tokens/s, one {statistics.median(one):.0f}: {ratio:.1f} "
                      f"times (limit 4), the median of {rounds} pairs")
    finally:
        assert server.stop() == 0


def prefix(scale):
    server, rounds = Server(), max(3, int(9 * scale))
    try:
        cold, warm, n_prompt = [], [], 0
        for i in range(rounds):
            words = random.Random(i)
            text = " ".join(words.choice("the sun and moon are far away from here but not too far".split()) for _ in range(1600))
            ids = server.post("/tokenize", {"prompt": f"{i} {text}"})["tokens"][:1500]
            body = {"prompt": ids, "stream": True, "max_tokens": 2, "temperature": 0, "ignore_eos": True}

            def measure():
                begin = time.perf_counter()
                with socket.create_connection((server.host, server.port), timeout=120) as s:
                    s.sendall(request_bytes(body, "/v1/completions"))
                    got = b""
                    while not re.search(rb'"text": "[^"]', got):
                        piece = s.recv(65536)
                        assert piece, got
                        got += piece
                    took = time.perf_counter() - begin
                    while b"[DONE]" not in got:
                        got += s.recv(65536)
                return took
            n_prompt = len(ids)
            cold.append(measure())
            warm.append(min(measure() for _ in range(2)))
        ratio = statistics.median(c / w for c, w in zip(cold, warm))
        return report("prefix", ratio >= 10 and n_prompt == 1500, f"first token of a prompt of {n_prompt} tokens after {statistics.median(cold) * 1e3:.0f} ms, "
                      f"{statistics.median(warm) * 1e3:.1f} ms on a prefix hit: {ratio:.0f} times (limit 10), the median of {rounds} pairs")
    finally:
        assert server.stop() == 0


TESTS = {"streams": streams, "prefix": prefix, "crowd": crowd, "overload": overload, "restart": restart, "cancel": cancel}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TESTS))
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    for name in options.names:
        if name not in TESTS:
            parser.error(f"no test is called {name}: expected {', '.join(TESTS)}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    failed = [name for name in options.names or TESTS if not TESTS[name](options.scale)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
