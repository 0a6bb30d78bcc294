"""`tandem perplexity`: its figures against NumPy's from traced logits, and against saved logits of other runs."""
import json
import math
import os
import subprocess

import numpy
import pytest
from safetensors.numpy import load_file

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = "models/tandem-tiny"
CHUNK = 48


def tandem(*args, status=0, text=None):
    done = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=120, check=False, input=text)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    return done


def perplexity(*args):
    return json.loads(tandem("perplexity", *args, "--json").stdout)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("Once upon a time there was a little girl named Lily. She liked to play in the garden with her dog. "
                    "The capital of France is Paris. A cat is a small animal that likes to sleep. <|im_start|> is plain. " * 2)
    return str(path)


@pytest.fixture(scope="module")
def saved(text):
    path = text + ".logits"
    perplexity("-f", text, "--chunk", str(CHUNK), "--save-logits", path)
    return path


def test_figures_are_those_of_the_logits(text, saved, tmp_path):
    out = perplexity("-f", text, "--chunk", str(CHUNK))
    ids = json.loads(tandem("tokenize", "--json", text=open(text, encoding="utf-8").read()).stdout)["ids"]
    n_windows, first = len(ids) // CHUNK, CHUNK // 2
    assert n_windows >= 2 and out["windows"] == n_windows and out["scored"] == n_windows * (CHUNK - 1 - first)
    nll, rows = [], []
    for w in range(n_windows):
        window = ids[w * CHUNK : (w + 1) * CHUNK]
        trace = str(tmp_path / "t.safetensors")
        tandem("trace", "--ids", ",".join(map(str, window)), "-o", trace)
        logits = load_file(trace)["logits"]
        rows.append(logits[first:-1])
        x = logits.astype(numpy.float64)
        for i in range(first, CHUNK - 1):
            nll.append(numpy.log(numpy.exp(x[i] - x[i].max()).sum()) + x[i].max() - x[i][window[i + 1]])
    assert math.isclose(out["nll"], numpy.mean(nll), rel_tol=1e-9)
    assert math.isclose(out["perplexity"], math.exp(numpy.mean(nll)), rel_tol=1e-9)
    assert math.isclose(out["nll_standard_error"], numpy.std(nll, ddof=1) / math.sqrt(len(nll)), rel_tol=1e-9)
    assert math.isclose(out["perplexity_standard_error"], out["perplexity"] * out["nll_standard_error"], rel_tol=1e-9)
    base = load_file(saved)
    assert base["tokens"].shape == (n_windows, CHUNK) and numpy.array_equal(base["logits"], numpy.concatenate(rows))


def test_a_run_is_no_distance_from_itself(text, saved):
    out = perplexity("-f", text, "--kld", saved, "--fusion", "off", "--threads", "1")["kl"]  # the file's chunk counts
    assert out["max"] == 0 and out["top1_agreement"] == 1 and out["perplexity_ratio"] == 1


def test_divergence_of_a_quantised_model(text, saved, tmp_path):
    model = str(tmp_path / "q4.gguf")
    tandem("quantize", TINY, model, "--type", "q4_0")
    out = perplexity(model, "-f", text, "--kld", saved)
    again = str(tmp_path / "q4.logits")
    perplexity(model, "-f", text, "--chunk", str(CHUNK), "--save-logits", again)

    def log_softmax(x):
        x = x.astype(numpy.float64)
        x -= x.max(axis=1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(axis=1, keepdims=True))
    p, q = log_softmax(load_file(saved)["logits"]), log_softmax(load_file(again)["logits"])
    kl = numpy.sort((numpy.exp(p) * (p - q)).sum(axis=1))
    assert math.isclose(out["kl"]["mean"], kl.mean(), rel_tol=1e-6) and 0 < out["kl"]["mean"] < 0.2
    assert math.isclose(out["kl"]["max"], kl[-1], rel_tol=1e-6)
    assert math.isclose(out["kl"]["p99"], kl[math.ceil(0.99 * len(kl)) - 1], rel_tol=1e-6)
    assert math.isclose(out["kl"]["top1_agreement"], (p.argmax(axis=1) == q.argmax(axis=1)).mean())
    assert math.isclose(out["perplexity"] / out["kl"]["base_perplexity"], out["kl"]["perplexity_ratio"], rel_tol=1e-9)


def test_refusals(text, saved, tmp_path):
    assert "-f FILE" in tandem("perplexity", status=2).stderr
    assert "one of --save-logits" in tandem("perplexity", "-f", text, "--kld", saved, "--save-logits", "x", status=2).stderr
    assert "--chunk" in tandem("perplexity", "-f", text, "--chunk", "2", status=2).stderr
    assert "windows have 48" in tandem("perplexity", "-f", text, "--kld", saved, "--chunk", "40", status=1).stderr
    assert "another text" in tandem("perplexity", "-f", "README.md", "--kld", saved, status=1).stderr
    assert "--save-logits` wrote" in tandem("perplexity", "-f", text, "--kld", f"{TINY}/model.safetensors", status=1).stderr
    assert "at least 4" in tandem("perplexity", "-f", "-", status=1, text="Hi").stderr
    assert "no tokenizer" in tandem("perplexity", "synthetic:tiny-qwen3", "-f", text, status=1).stderr
    assert "cannot write" in tandem("perplexity", "-f", text, "--save-logits", "/nonexistent/x", status=1).stderr
    assert not os.path.exists(tmp_path / "x.part")
