"""The memory plan that `tandem inspect` shows, against what a run that fills its whole context really takes."""
import json
import os
import subprocess

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")


def plan(*options):
    done = subprocess.run([TANDEM, "inspect", "--json", *options], check=True, capture_output=True)
    return json.loads(done.stdout)["memory"]


def peak(*options):
    """The most memory that a process held, in bytes."""
    child = subprocess.Popen([TANDEM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, errors
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("ctx, kv_type", [(2048, "bf16"), (2048, "q8_0"), (1024, "f32")])
def test_a_full_context_takes_what_the_plan_says(ctx, kv_type):
    options = ["--ctx", str(ctx), "--kv-type", kv_type, "--device", "cpu", "--threads", "2"]
    p = plan(*options)
    assert p["total"] == p["weights"] + p["kv"] + p["activations"] and p["context"] == ctx
    ids = ",".join(str(7 + i % 1000) for i in range(ctx - 3))  # a prompt: faster than as many steps
    taken = peak("run", "--ids", ids, "-n", "2", "--ignore-eos", "--greedy", *options)
    print(ctx, kv_type, p["total"], taken, taken / p["total"])
    assert p["total"] / 1.3 < taken < 1.3 * p["total"], (p, taken)


def test_the_plan_follows_the_options():
    base = plan("--kv-type", "bf16", "--device", "cpu")
    q8, f32 = plan("--kv-type", "q8_0", "--device", "cpu"), plan("--kv-type", "f32", "--device", "cpu")
    assert q8["kv"] * 32 == base["kv"] * 17 and f32["kv"] == 2 * base["kv"]  # 34 bytes for 32 channels
    half = plan("--ctx", str(base["context"] // 2), "--device", "cpu")
    assert half["kv"] * 2 == base["kv"] and half["weights"] == base["weights"]
    four = plan("--batch", "4", "--device", "cpu")
    assert four["kv"] == 4 * base["kv"] and four["batch"] == 4
    chat = subprocess.run([TANDEM, "chat", "--device", "cpu"], input="/stats\n", capture_output=True, text=True, check=True)
    line = next(s for s in chat.stdout.splitlines() if s.startswith("memory"))
    for part in ("weights", "KV", "activations"):
        assert f"{part} {base[part.lower()] / 1e6:.1f} MB" in line


def test_an_impossible_plan_is_refused():
    done = subprocess.run([TANDEM, "inspect", "--ctx", "9999"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "2048 positions" in done.stderr
    done = subprocess.run([TANDEM, "inspect", "--ctx", "much"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--ctx" in done.stderr


def test_the_plan_says_where_repacked_weights_are(tmp_path):
    large = tmp_path / "large.gguf"  # as large as files whose copies are kept
    subprocess.run([TANDEM, "quantize", "models/tandem-tiny", str(large), "--type", "bf16"], check=True, capture_output=True)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def of(*options):
        done = subprocess.run([TANDEM, "inspect", str(large), "--isa", "avx2", "--device", "cpu", *options, "--json"], check=True,
                              capture_output=True, env=env)
        memory = json.loads(done.stdout)["memory"]
        return memory["repacked"], memory["repacked_in"]

    size, path = of()
    assert size > 32 << 20 and path.startswith(f"{tmp_path}/tandem/octets/large.gguf-") and not os.path.exists(path)
    subprocess.run([TANDEM, "run", str(large), "--ids", "1,2", "-n", "1", "--isa", "avx2", "--device", "cpu"], check=True,
                   capture_output=True, env=env)
    assert os.path.getsize(path) >= size
    assert of("--repack", "memory") == (size, "") and of("--repack", "off") == (0, "")
