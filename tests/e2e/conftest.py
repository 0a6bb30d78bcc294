"""Shared by the end-to-end tests: they run from the repository's root, on the binary that $TANDEM names."""
import os
import pathlib
import signal

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pytest_configure():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would all programs
    os.chdir(ROOT)
    os.environ.setdefault("TANDEM", "build/tandem")
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # tests that call make start afresh
        os.environ.pop(name, None)
