"""Shared by the end-to-end tests: they run from the repository's root, on the binary that $TANDEM names."""
import os
import pathlib
import signal

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pytest_configure():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would all programs
    os.chdir(ROOT)
    os.environ.setdefault("TANDEM", "build/tandem")
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # tests that call make start afresh
        os.environ.pop(name, None)


# A file that needs other options has its own.
@pytest.fixture(scope="module")
def server():
    from serving import Server
    s = Server()
    yield s
    assert s.alive()
    assert s.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    import openai
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
