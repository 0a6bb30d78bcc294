"""`tandem bench`: the contract of its output, and logits that are those of `run` whatever is measured beside them."""
import csv
import io
import json
import os
import subprocess

TANDEM = os.environ.get("TANDEM", "build/tandem")
N_VOCAB = 8192


def tandem(*args, status=0):
    done = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    return done


def bench(*args):
    return json.loads(tandem("bench", *args, "--json").stdout)


def hashes(*args):
    return [r["logits_hash"] for r in bench(*args, "--repeat", "1")["results"]]


def test_json_has_what_the_contract_lists():
    out = bench("--prefill", "9", "--depth", "0,40", "--batch", "1,3", "--repeat", "3")
    assert out["device"].startswith("cpu/") and out["bandwidth_gbs"] > 0 and out["threads"] >= 1
    results = out["results"]
    assert [(r["kind"], r["batch"], r["depth"]) for r in results] == [
        ("prefill", 1, 0), ("decode", 1, 0), ("decode", 1, 40), ("decode", 3, 0), ("decode", 3, 40)]
    for r in results:
        assert r["type"] == "bf16" and r["repeats"] == 3 and len(r["logits_hash"]) == 16
        assert 0 < r["tps"]["min"] <= r["tps"]["median"] <= r["tps"]["max"]
        assert r["gbs"] > 0 and r["bandwidth_share"] > 0 and r["gflops"] > 0
        assert r["n_tokens"] == 9 if r["kind"] == "prefill" else 4 <= r["n_tokens"] <= 64


def test_bytes_and_arithmetic_are_those_of_the_shape():
    """tiny-qwen3 in f32: what a step of decode must read and multiply can be counted by hand."""
    r = bench("--synthetic", "tiny-qwen3", "--type", "f32", "--decode", "--depth", "0", "--repeat", "2")["results"][0]
    layer = 256 * (4 * 64 * 2 + 2 * 64 * 2) + 3 * 256 * 512
    matrices, vectors = 3 * layer + 640 * 256, 3 * (2 * 256 + 2 * 64) + 256
    n = r["n_tokens"]
    kv = sum(2 * 3 * 2 * 64 * 2 * (i + 1) for i in range(n))
    seconds = n / r["tps"]["median"]
    assert abs(r["gbs"] * 1e9 * seconds / (4 * (matrices + vectors) * n + kv) - 1) < 0.2  # medians of ratios differ a bit
    assert abs(r["gflops"] / r["gbs"] - 2 * (matrices * n + 3 * 2 * 256 * n * (n + 1) / 2)
               / (4 * (matrices + vectors) * n + kv)) < 1e-3


def test_so_many_tokens_are_decoded():
    out = bench("--decode", "--depth", "7", "--batch", "2", "--decode-tokens", "70", "--repeat", "1")["results"]
    assert [(r["kind"], r["batch"], r["depth"], r["n_tokens"]) for r in out] == [("decode", 2, 7, 70)]
    assert [r["logits_hash"] for r in out] == hashes("--depth", "7")


def test_prefill_hash_is_that_of_run():
    n = 70
    ids = ",".join(str((i * 7919 + 17) % N_VOCAB) for i in range(n))
    run = json.loads(tandem("run", "--ids", ids, "-n", "1", "--greedy", "--json").stdout)
    assert hashes("--prefill", str(n)) == [run["logits_hash"]]


def test_hash_ignores_batch_chunk_threads_and_fusion():
    (prefill,) = set(hashes("--prefill", "70") + hashes("--prefill", "70", "--chunk", "7", "--threads", "1")
                     + hashes("--prefill", "70", "--fusion", "off") + hashes("--prefill", "70", "--prompts", "5", "--chunk", "150")
                     + hashes("--prefill", "70", "--prompts", "2", "--chunk", "32"))
    (decode,) = set(hashes("--depth", "50", "--batch", "1,2,5") + hashes("--depth", "50", "--fusion", "off"))
    assert prefill != decode
    assert decode not in hashes("--depth", "51")  # another depth is another context


def test_comparing_fusions():
    out = bench("--depth", "10", "--fusion", "on,off", "--repeat", "3")["results"]
    assert [r["fusion"] for r in out] == ["on", "off"] and out[0]["logits_hash"] == out[1]["logits_hash"]
    ratio = out[0]["ratio"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] and "ratio" not in out[1]
    text = tandem("bench", "--depth", "10", "--fusion", "off,on", "--repeat", "1").stdout
    assert "fusion off over on" in text


def test_synthetic_types_and_csv():
    text = tandem("bench", "--synthetic", "tiny-llama", "--type", "f16,q8_0,q4_0", "--prefill", "5", "--depth", "3",
                  "--repeat", "1", "--csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(r["type"], r["kind"]) for r in rows] == [(t, k) for t in ("f16", "q8_0", "q4_0") for k in ("prefill", "decode")]
    assert all(float(r["tps_median"]) > 0 and len(r["logits_hash"]) == 16 for r in rows)


def test_default_set_leaves_out_what_the_model_cannot_hold():
    done = tandem("bench", "--synthetic", "tiny-qwen2", "--decode", "--repeat", "1")
    assert "left out: decode of batch 1 at 16384 tokens needs 16448 positions, the model has 16384" in done.stderr
    assert "at 4096" in done.stdout and "x32" in done.stdout


def test_workload():
    """The first requests of offline-256: all tokens come, and the same ones however many run at once."""
    lengths = [[int(n) for n in line.replace(",", " ").split()[:3]] for line in open("src/cli/offline_256.h", encoding="utf-8")
               if line.startswith("    ")]
    prompts, outputs = lengths[0], lengths[13]
    (r,) = bench("--synthetic", "tiny-llama", "--workload", "offline-3")["results"]
    assert r["kind"] == "workload" and r["n_tokens"] == sum(outputs) and r["n_prompt_tokens"] == sum(prompts)
    assert r["tps"]["median"] > 0 and r["batch"] == 3
    (again,) = bench("--synthetic", "tiny-llama", "--workload", "offline-3", "--repeat", "2")["results"]
    assert again["repeats"] == 2 and again["tokens_hash"] == r["tokens_hash"]
    assert again["n_cached_tokens"] == 0  # a repeat computes its prompts, too
    (one,) = bench("--synthetic", "tiny-llama", "--workload", "offline-3", "--batch", "1", "--chunk", "64")["results"]
    assert one["tokens_hash"] == r["tokens_hash"] and one["batch"] == 1
    assert "3 requests" in tandem("bench", "--synthetic", "tiny-llama", "--workload", "offline-3").stdout


def test_usage():
    for args, says in [(["--prefill", "0"], "--prefill"), (["--decode-tokens", "0"], "--decode-tokens"), (["--type", "q8_0"], "--type goes with --synthetic"),
                       (["--json", "--csv"], "one of --json and --csv"), (["--fusion", "on,of"], "fusion 'on'"),
                       (["--workload", "x"], "expected offline-256"), (["--workload", "offline-257"], "expected offline-256"),
                       (["--prompts", "2"], "--prefill"), (["--workload", "offline-2", "--batch", "1,2"], "one --batch"), (["--batch", "1,,2"], "--batch"),
                       (["models/tandem-tiny", "--synthetic", "tiny-llama"], "found both")]:
        assert says in tandem("bench", *args, status=2).stderr, args
    for args, says in [(["--depth", "9999999"], "positions, the model has"),
                       (["--depth", "0", "--decode-tokens", "9999999"], "positions, the model has"),
                       (["--synthetic", "qwen9"], "expected one of qwen3-0.6b"),
                       (["--synthetic", "tiny-llama", "--type", "q9"], "type \"q9\"")]:
        assert says in tandem("bench", *args, status=1).stderr, args
