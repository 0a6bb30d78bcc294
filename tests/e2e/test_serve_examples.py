"""The examples of examples/serving: what Debian's nginx, systemd and a YAML parser make of them."""
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request

import pytest
import yaml

from serving import SLOW, TANDEM, Server, chat
from test_serve import certificate

EXAMPLES = pathlib.Path("examples/serving")
KEYS = {name: f"secret-key-of-team-{name}" for name in "abc"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port):
    end = time.time() + 20 * SLOW
    while time.time() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here")
def test_nginx_balances_streams(tmp_path):
    certificate(tmp_path)
    (tmp_path / "keys").write_text("".join(k + "\n" for k in KEYS.values()))
    replicas = [Server("--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys")) for _ in range(2)]
    port, nginx = free_port(), None
    try:
        text = (EXAMPLES / "nginx.conf").read_text()
        for old, new in (("10.0.0.1:8080", f"127.0.0.1:{replicas[0].port}"), ("10.0.0.2:8080", f"127.0.0.1:{replicas[1].port}"),
                         ("/etc/ssl/llm.pem", str(tmp_path / "cert")), ("/etc/ssl/llm.key", str(tmp_path / "key")),
                         ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")):
            assert text.count(old) == 1
            text = text.replace(old, new)
        folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n"
                                             f"http {{\naccess_log off;\n{folders}{text}\n}}\n")
        command = ["nginx", "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
        tried = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert tried.returncode == 0, tried.stderr
        nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(port)
        context = ssl.create_default_context(cafile=str(tmp_path / "cert"))

        def fetch(path, body=None, key="a", **headers):
            return urllib.request.urlopen(urllib.request.Request(
                f"https://localhost:{port}{path}", body and json.dumps(body).encode(),
                {"Authorization": f"Bearer {KEYS[key]}", **headers}), context=context, timeout=60 * SLOW)

        def generated(server):
            _, _, metrics = server.request("GET", "/metrics", headers={"x-api-key": KEYS["a"]})
            return float(re.search(r"^tandem_generated_tokens_total (\S+)$", metrics.decode(), re.M).group(1))
        # Events are passed on when they come, not in blocks.
        moments = [time.time() for line in fetch("/v1/chat/completions", chat("Go on.", stream=True, ignore_eos=True, max_tokens=60))
                   if line.startswith(b"data: ")]
        assert len(moments) > 60 and moments[-1] - moments[0] > 0.02 and len({round(m, 2) for m in moments}) > 3
        # A key's requests go to one replica, and the page's own origin is let through.
        for key in KEYS:
            before = [generated(s) for s in replicas]
            for _ in range(3):
                assert fetch("/v1/chat/completions", chat("Hi", max_tokens=4), key, Origin=f"https://localhost:{port}").status == 200
            time.sleep(0.3)
            assert sum(generated(s) > b for s, b in zip(replicas, before)) == 1
        # One replica goes: the other one answers for it.
        assert replicas[0].stop() == 0
        for key in KEYS:
            assert fetch("/v1/chat/completions", chat("Hi", max_tokens=1), key).status == 200
    finally:
        if nginx:
            nginx.terminate()
            nginx.wait(10)
        for s in replicas:
            s.stop()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_unit(tmp_path):
    text = (EXAMPLES / "tandem.service").read_text()
    assert "/usr/local/bin/tandem " in text
    (tmp_path / "tandem.service").write_text(text.replace("/usr/local/bin/tandem ", os.path.abspath(TANDEM) + " "))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "tandem.service")], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "tandem" in line]
    assert done.returncode == 0 and not said, done.stderr
    assert {"@system-service", "seccomp"} <= set(re.search(r"^SystemCallFilter=(.*)$", text, re.M).group(1).split())


def options_of(arguments):
    """The options that a command line names, all of which this binary must know."""
    known = subprocess.run([TANDEM, "serve", "--help"], capture_output=True, text=True).stdout
    options = [a for a in arguments if a.startswith("--")]
    assert options and all(f" {o} " in known for o in options), options
    return options


def test_kubernetes():
    deployment, service = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (deployment["apiVersion"], deployment["kind"], service["kind"]) == ("apps/v1", "Deployment", "Service")
    pod = deployment["spec"]["template"]
    container, = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    port, = (p["containerPort"] for p in container["ports"])
    assert service["spec"]["ports"][0]["targetPort"] == port == int(container["args"][container["args"].index("--port") + 1])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port
    assert container["args"][0] == "serve" and options_of(container["args"])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 30 + 5  # --grace and the pause before it


def test_dockerfile():
    text = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", " ")
    command = json.loads(re.search(r"^CMD (\[.*\])$", text, re.M).group(1))
    assert command[0] == "serve" and options_of(command)
    # Every library that the program needs is named, by its Debian package.
    needed = set(re.findall(r"NEEDED\s+(\S+)\.so", subprocess.run(["objdump", "-p", TANDEM], capture_output=True, text=True).stdout))
    package = {"libjansson": "libjansson4", "libpcre2-8": "libpcre2-8-0", "libutf8proc": "libutf8proc2", "libmicrohttpd": "libmicrohttpd12",
               "libcrypto": "libssl3", "libedit": "libedit2", "libcurl": "libcurl4"}
    system = {"libc", "libm", "ld-linux-x86-64", "libdl", "librt", "libpthread"}
    assert needed and {package[name] for name in needed - system} <= set(text.split())
