#!/usr/bin/env python3
"""tandem beside llama.cpp: the same GGUF file, the same threads, in alternation; prints the paired ratios.

peer_llama.py MODEL.gguf [--prefill N,...] [--depth N,...] [--repeat N] [--threads N] [--json]

Needs llama-cpp-python, built from its source package for this machine's CPU:
    python3 -m venv peer && CMAKE_ARGS=-DGGML_NATIVE=on peer/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    peer/bin/python tools/peer_llama.py MODEL.gguf
Every repeat measures one program right after the other, and the order changes from repeat to repeat, so that a neighbour
who takes the machine's memory hits both alike: believe the ratios, not the figures. Sampling is part of neither.
"""
import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DECODE_TOKENS = 24


class Llama:
    """llama.cpp through its own C interface, as far as timing needs it."""

    def __init__(self, path, threads, n_ctx):
        import llama_cpp
        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)  # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_ctx
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp has no memory for a context of {n_ctx}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, start, n):
        """Runs n tokens from position `start` on; the logits of the last."""
        ids = (ctypes.c_int32 * n)(*[(i * 7919 + 17) % self.n_vocab for i in range(start, start + n)])
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, n)) != 0:
            sys.exit("llama.cpp: llama_decode failed")
        self.lib.llama_synchronize(self.context)

    def prefill(self, n):
        self.lib.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        self.feed(0, n)
        return n / (time.perf_counter() - start)

    def fill(self, depth):
        self.lib.llama_memory_clear(self.memory, True)
        for at in range(0, depth, 512):
            self.feed(at, min(512, depth - at))

    def decode(self, depth):
        """Behind fill(depth). One step before the clock starts warms up."""
        self.lib.llama_memory_seq_rm(self.memory, 0, depth, -1)
        self.feed(depth, 1)
        start = time.perf_counter()
        for i in range(DECODE_TOKENS):
            self.feed(depth + 1 + i, 1)
        return DECODE_TOKENS / (time.perf_counter() - start)


def tandem(binary, path, threads, *args):
    command = [binary, "bench", path, *args, "--threads", str(threads), "--repeat", "1", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    result = json.loads(done.stdout)["results"][0]
    return result["tps"]["median"], result["bandwidth_share"]


def numbers(text):
    return [int(n) for n in text.split(",") if n]


def main():
    parser = argparse.ArgumentParser(description="tandem beside llama.cpp on one GGUF file, in alternation")
    parser.add_argument("model")
    parser.add_argument("--prefill", type=numbers, default=[256, 512], metavar="N,...")
    parser.add_argument("--depth", type=numbers, default=[0], metavar="N,...")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tandem", default=os.environ.get("TANDEM", str(ROOT / "build" / "tandem")))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        peer = Llama(args.model, args.threads, max([*args.prefill, *(d + 64 for d in args.depth), 256]))
    except ImportError:
        sys.exit("peer_llama.py needs llama-cpp-python; the head of this file says how to build it")
    tests = [("prefill", n) for n in args.prefill] + [("decode", d) for d in args.depth]
    results = []
    for kind, n in tests:
        ours, theirs, shares = [], [], []
        if kind == "decode":
            peer.fill(n)
        for r in range(args.repeat):
            for who in ("tandem", "peer") if r % 2 == 0 else ("peer", "tandem"):
                if who == "peer":
                    theirs.append(peer.prefill(n) if kind == "prefill" else peer.decode(n))
                else:
                    tps, share = tandem(args.tandem, args.model, args.threads, "--prefill" if kind == "prefill" else "--depth",
                                        str(n))
                    ours.append(tps)
                    shares.append(share)
            if sys.stderr.isatty():
                print(f"\r\033[K{kind} {n}: {r + 1} of {args.repeat} ", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        ratios = sorted(a / b for a, b in zip(ours, theirs))
        results.append({"kind": kind, "n": n, "tandem_tps": statistics.median(ours), "llama_tps": statistics.median(theirs),
                        "ratio": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
                        "tandem_bandwidth_share": statistics.median(shares)})
        if not args.json:
            r = results[-1]
            where = f"{kind} {n}" if kind == "prefill" else f"decode at {n}"
            print(f"{where:18} tandem {r['tandem_tps']:9.2f} tok/s   llama.cpp {r['llama_tps']:9.2f} tok/s   "
                  f"ratio {r['ratio']['median']:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)
    if args.json:
        json.dump({"model": args.model, "threads": args.threads, "llama_cpp_python": peer.lib.__version__,
                   "results": results}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
