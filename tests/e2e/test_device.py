"""--device, on a machine with and without a GPU: a GPU that was asked for by name is used or is an error, never replaced."""
import json
import os
import pathlib
import subprocess

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
HAS_GPU = pathlib.Path("/dev/nvidia0").exists()
# What each subcommand with --device needs to run.
COMMANDS = {
    "run": ["run", "--ids", "1,2", "-n", "1", "--greedy", "--json"],
    "bench": ["bench", "--synthetic", "tiny-qwen3", "--prefill", "8", "--repeat", "1", "--json"],
    "trace": ["trace", "--ids", "1,2", "-o", "/dev/null"],
    "chat": ["chat", "-n", "1"],
    "perplexity": ["perplexity", "-f", "README.md", "--chunk", "64"],
    "check": ["check", "--synthetic", "tiny-qwen3", "--stage", "weights"],
    "serve": ["serve", "--port", "0"],
}


def tandem(command, device, status):
    done = subprocess.run([TANDEM, *COMMANDS[command], "--device", device], capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == status, (device, done.stdout, done.stderr)
    return done


def test_cpu():
    answer = json.loads(tandem("run", "cpu", 0).stdout)
    assert answer["device"].startswith("cpu/")
    assert json.loads(tandem("bench", "cpu", 0).stdout)["device"].startswith("cpu/")


@pytest.mark.skipif(HAS_GPU, reason="auto takes the GPU")
def test_auto_without_a_gpu_is_the_cpu():
    auto, cpu = (json.loads(tandem("run", d, 0).stdout) for d in ("auto", "cpu"))
    assert auto["device"] == cpu["device"] and auto["logits_hash"] == cpu["logits_hash"]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_by_name_is_never_replaced(command, device):
    done = tandem(command, device, 1)
    assert done.stdout == "" and "listening" not in done.stderr
    name = "cuda:1" if device == "cuda:1" else "cuda"
    assert f"tandem: {command}: " in done.stderr and name in done.stderr
    assert any(words in done.stderr for words in ("has no CUDA", "CUDA driver", "run on the CPU so far"))


def test_a_gpu_that_no_machine_has():
    assert "cuda:999" in tandem("run", "cuda:999", 1).stderr


@pytest.mark.parametrize("device", ["gpu", "", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:99999", "cuda0", "cpu:0"])
def test_another_name_is_wrong_usage(device):
    assert "--device: expected auto, cpu, cuda or cuda:N" in tandem("run", device, 2).stderr
